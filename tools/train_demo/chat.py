"""Renders messages exactly as Qwen3's chat template does, as (text, weight) segments.

Weight 1 marks what the model is trained to write. Cuts lie only where the tokenizer cuts too (special tokens
and line ends), so that the pieces can be tokenised one by one. prepare_data.py checks the rendering against
the Jinja template itself.
"""

import json

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call>"
)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text, think=""):
    return {"role": "assistant", "content": text, "reasoning_content": think}


def tool_call(name, arguments, text=""):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": text, "reasoning_content": "", "tool_calls": [call]}


def tool_result(text):
    return {"role": "tool", "content": text}


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def body_of(message):
    text = message["content"]
    for i, call in enumerate(message.get("tool_calls", [])):
        fn = call["function"]
        if text or i:
            text += "\n"
        text += '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>' % (fn["name"], dumps(fn["arguments"]))
    return text


def render(messages, tools=None, thinking=True):
    """Segments of a whole conversation that ends with an assistant turn.

    thinking=False gives the text of enable_thinking=false: the empty think block is part of the prompt, so it
    is not trained and the reply carries no thoughts. Earlier replies are trained too, but for their first word:
    a live model sees `<think>` there, which the template removes from history.
    """
    out = []
    first = messages[0]
    if tools:
        head = "<|im_start|>system\n"
        if first["role"] == "system":
            head += first["content"] + "\n\n"
        out.append((head + TOOLS_HEAD + "".join("\n" + dumps(t) for t in tools) + TOOLS_TAIL + "<|im_end|>\n", 0))
    elif first["role"] == "system":
        out.append(("<|im_start|>system\n" + first["content"] + "<|im_end|>\n", 0))
    last_query = max(i for i, m in enumerate(messages) if m["role"] == "user")
    for i, m in enumerate(messages):
        role = m["role"]
        if role == "user" or (role == "system" and i > 0):
            out.append(("<|im_start|>" + role + "\n" + m["content"] + "<|im_end|>\n", 0))
        elif role == "tool":
            lead = "<|im_start|>user" if messages[i - 1]["role"] != "tool" else ""
            ends = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
            out.append(
                (
                    lead
                    + "\n<tool_response>\n"
                    + m["content"]
                    + "\n</tool_response>"
                    + ("<|im_end|>\n" if ends else ""),
                    0,
                )
            )
        elif role == "assistant":
            out.append(("<|im_start|>assistant\n", 0))
            if i > last_query and i + 1 == len(messages):
                block = "<think>\n" + (m["reasoning_content"] if thinking else "") + "\n</think>\n\n"
                out.append((block, 1 if thinking else 0))
                out.append((body_of(m) + "<|im_end|>", 1))
            else:
                out.append((body_of(m) + "<|im_end|>", 2))  # 2: trained but for its first token
            out.append(("\n", 0))
    return out


def prompt_text(messages, tools=None, thinking=True):
    """The generation prompt for messages that end with a user or tool turn."""
    segments = render(messages + [assistant("")], tools, thinking)
    text = "".join(t for t, _ in segments)
    cut = text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
    return text[:cut] + ("" if thinking else "<think>\n\n</think>\n\n")
