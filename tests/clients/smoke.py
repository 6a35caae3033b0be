"""The Python half of smoke.sh: the OpenAI client and gRPC through reflection, against KVARN_HTTP and KVARN_GRPC."""

import os
import sys
import threading

import grpc
import openai
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grpc_client import Client, fold

HTTP = os.environ.get("KVARN_HTTP", "http://127.0.0.1:8000")
GRPC = os.environ.get("KVARN_GRPC", "127.0.0.1:8001")
HELLO = [{"role": "user", "content": "Hello!"}]


def openai_client():
    return openai.OpenAI(base_url=f"{HTTP}/v1", api_key="none", max_retries=0, timeout=120,
                         _strict_response_validation=True)


def check(condition, what):
    if not condition:
        raise AssertionError(what)


def test_openai_models():
    client = openai_client()
    models = client.models.list().data
    check(models, "no model is served")
    check(client.models.retrieve(models[0].id).id == models[0].id, "models.retrieve gives another model")


def test_openai_chat():
    client = openai_client()
    answer = client.chat.completions.create(model=client.models.list().data[0].id, messages=HELLO,
                                            max_tokens=32, temperature=0, seed=1)
    choice = answer.choices[0]
    check(choice.message.role == "assistant", "role")
    check(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason}")
    check(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, "usage")


def test_openai_stream_folds_to_the_answer():
    client = openai_client()
    ask = dict(model=client.models.list().data[0].id, messages=HELLO, max_tokens=32, temperature=0, seed=1)
    whole = client.chat.completions.create(**ask)
    text, reasoning, finish, usage = "", "", None, None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finish = choice.finish_reason or finish
    check(text == (whole.choices[0].message.content or ""), f"stream {text!r} is not {whole.choices[0].message!r}")
    check(reasoning == (getattr(whole.choices[0].message, "reasoning_content", None) or ""), "reasoning differs")
    check(finish == whole.choices[0].finish_reason, "finish_reason differs")
    check(usage is not None and usage.completion_tokens == whole.usage.completion_tokens, "usage differs")


def test_openai_completion_and_logprobs():
    client = openai_client()
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=2)
    check(len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens, "a logprob per token")
    chat = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8, temperature=0, logprobs=True,
                                          top_logprobs=3)
    check(len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens, "a logprob per token")


def test_openai_errors():
    client = openai_client()
    for error, fields in [(openai.NotFoundError, {"model": "no-such-model"}),
                          (openai.BadRequestError, {"temperature": 5}),
                          (openai.BadRequestError, {"max_tokens": 10**9})]:
        try:
            client.chat.completions.create(**{"model": client.models.list().data[0].id, "messages": HELLO, **fields})
        except error as raised:
            check(raised.code, "an error has a code")
        else:
            raise AssertionError(f"{fields} was accepted")


def test_grpc_reflection_lists_the_services():
    client = Client(GRPC)
    for service in ("kvarn.v1.Inference", "kvarn.v1.Control", "grpc.health.v1.Health"):
        check(service in client.services(), f"{service} is not listed")
    client.close()


def test_grpc_generate_and_stream_agree():
    client = Client(GRPC)
    ask = dict(chat={"messages": HELLO}, sampling={"temperature": 0}, stopping={"max_tokens": 24},
               response={"token_ids": True, "logprobs": True})
    whole = client.call("Inference", "Generate", **ask)
    streamed = fold(client.call("Inference", "GenerateStream", **ask))
    check(whole.outputs == streamed.outputs, f"{whole.outputs} is not {streamed.outputs}")
    check(whole.outputs[0].num_tokens == whole.usage.completion_tokens == len(whole.outputs[0].token_ids), "tokens")
    check(whole.outputs[0].HasField("finish"), "no finish")
    client.close()


def test_grpc_and_http_generate_the_same():
    client = Client(GRPC)
    over_grpc = client.call("Inference", "Generate", chat={"messages": HELLO}, sampling={"temperature": 0},
                            stopping={"max_tokens": 24})
    http = openai_client()
    over_http = http.chat.completions.create(model=http.models.list().data[0].id, messages=HELLO, temperature=0,
                                             max_tokens=24).choices[0].message
    check(over_grpc.outputs[0].text == (over_http.content or ""), "content differs")
    check(over_grpc.outputs[0].reasoning == (getattr(over_http, "reasoning_content", None) or ""), "reasoning differs")
    client.close()


def test_grpc_text_calls():
    client = Client(GRPC)
    text = "Grüße, 世界!"
    ids = client.call("Inference", "Tokenize", text=text).token_ids
    check(client.call("Inference", "Detokenize", token_ids=ids).text == text, "detokenise(tokenise(s)) is not s")
    rendered = client.call("Inference", "RenderChat", chat={"messages": HELLO})
    check("Hello!" in rendered.text, "the rendered chat lacks the message")
    check(client.call("Inference", "Tokenize", chat={"messages": HELLO}).token_ids == rendered.token_ids, "chat ids")
    client.close()


def test_grpc_control():
    client = Client(GRPC)
    info = client.call("Control", "GetServerInfo")
    check(info.api_version == "kvarn.v1" and info.kv_block_size == 128, f"server info {info}")
    check(client.call("Control", "GetModelInfo").vocab_size > 0, "model info")
    check(0 <= client.call("Control", "GetLoad").kv_usage <= 1, "load")
    client.close()


def test_grpc_errors_carry_code_and_param():
    client = Client(GRPC)
    for fields, status, code, param in [
            ({"text": "x", "sampling": {"temperature": 5}}, "INVALID_ARGUMENT", "invalid_value", "sampling.temperature"),
            ({}, "INVALID_ARGUMENT", "missing_required_parameter", "prompt"),
            ({"text": "x", "model": "no-such-model"}, "NOT_FOUND", "model_not_found", "model")]:
        try:
            client.call("Inference", "Generate", metadata=[("x-request-id", "smoke-1")], **fields)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata())
            check(error.code().name == status, f"{fields}: {error.code()}")
            check(trailing.get("kvarn-error-code") == code and trailing.get("kvarn-error-param") == param, trailing)
            check(trailing.get("x-request-id") == "smoke-1", trailing)
        else:
            raise AssertionError(f"{fields} was accepted")
    client.close()


def test_grpc_deadline():
    client = Client(GRPC)
    try:
        client.call("Inference", "Generate", timeout=0.01, text="word " * 200,
                    stopping={"max_tokens": 4000, "ignore_eos": True})
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, f"{error.code()}")
    else:
        raise AssertionError("4000 tokens in 10 ms")
    client.close()


def test_grpc_health_watch():
    channel = grpc.insecure_channel(GRPC)
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "kvarn.v1.Inference", "kvarn.v1.Control"):
        check(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == serving, service)
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.NOT_FOUND, f"{error.code()}")
    else:
        raise AssertionError("Check knows a service that is not there")
    for service, expected in (("", serving), ("nobody", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        timer = threading.Timer(10, watch.cancel)
        timer.start()
        check(next(watch).status == expected, f"Watch of {service!r}")
        timer.cancel()
        watch.cancel()
    channel.close()


def main():
    failed = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        try:
            test()
            print(f"smoke: {name[5:].replace('_', ' '):<52}ok")
        except Exception as error:  # one failing check must not hide the others
            failed += 1
            print(f"smoke: {name[5:].replace('_', ' '):<52}FAILED: {type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
