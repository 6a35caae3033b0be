"""A gRPC client that knows nothing but the address: messages and methods come from reflection."""

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Client:
    def __init__(self, address, credentials=None, options=None):
        options = options or []
        self.channel = (grpc.secure_channel(address, credentials, options) if credentials
                        else grpc.insecure_channel(address, options))
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)

    def close(self):
        self.channel.close()

    def services(self):
        return sorted(self.database.get_services())

    def message(self, name, **fields):
        """kvarn.v1.NAME(**fields); nested messages may be given as dicts."""
        full_name = name if "." in name else f"kvarn.v1.{name}"
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(full_name))(**fields)

    def method(self, service, name):
        """A callable for kvarn.v1.SERVICE/NAME (or a full service name), as grpc's stubs have it."""
        full_name = service if "." in service else f"kvarn.v1.{service}"
        method = self.pool.FindServiceByName(full_name).FindMethodByName(name)
        make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        return make(f"/{full_name}/{name}",
                    request_serializer=lambda request: request.SerializeToString(),
                    response_deserializer=message_factory.GetMessageClass(method.output_type).FromString)

    def call(self, service, name, timeout=120, metadata=None, **fields):
        full_name = service if "." in service else f"kvarn.v1.{service}"
        method = self.pool.FindServiceByName(full_name).FindMethodByName(name)
        request = message_factory.GetMessageClass(method.input_type)(**fields)
        return self.method(service, name)(request, timeout=timeout, metadata=metadata)


def fold(messages):
    """The response that Generate would have given for a stream of messages."""
    folded = None
    outputs = {}
    for message in messages:
        if folded is None:
            folded = type(message)()
            folded.id = message.id
        if message.HasField("prompt_info"):
            folded.prompt_info.CopyFrom(message.prompt_info)
        if message.HasField("usage"):
            folded.usage.CopyFrom(message.usage)
        for delta in message.outputs:
            whole = outputs.setdefault(delta.index, type(delta)(index=delta.index))
            whole.text += delta.text
            whole.reasoning += delta.reasoning
            whole.num_tokens += delta.num_tokens
            whole.token_ids.extend(delta.token_ids)
            whole.logprobs.extend(delta.logprobs)
            if delta.HasField("finish"):
                whole.finish.CopyFrom(delta.finish)
    for index in sorted(outputs):
        folded.outputs.append(outputs[index])
    return folded
