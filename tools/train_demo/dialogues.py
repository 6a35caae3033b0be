"""Synthetic conversations: single and multi-turn small talk, sums, lists, memory and one-call tool use.

make_dialogue(rng) returns segments (text, weight) as chat.render does. Only rng decides, so a seed fixes all.
"""

import exchanges as x
import lists
import tasks
import wordlists as w
from chat import assistant, dumps, render, system, tool_call, tool_result, user

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a small demo model.",
    "Answer briefly.",
    "You are the kvarn demo model.",
    "Be polite and short.",
    "You answer questions.",
    "You are an assistant.",
]

KINDS = [
    (x.greeting, 14),
    (x.identity, 10),
    (x.arithmetic, 26),
    (lists.copying, 14),
    (lists.listing, 22),
    (lists.fact, 12),
    (x.counting, 8),
    (x.compare, 5),
    (x.deflect, 5),
    (x.story, 5),
    (tasks.odd_copy, 6),
    (tasks.sentence_copy, 6),
    (tasks.json_object, 6),
    (tasks.word_question, 6),
    (tasks.puzzled, 3),
]
FUNCS, ODDS = [k for k, _ in KINDS], [n for _, n in KINDS]
SPOKEN = {x.greeting, x.identity, x.deflect, lists.fact, x.story, x.compare}  # how one asks does not matter


def with_system(rng, messages, odds=0.35):
    if rng.random() > odds:
        return messages
    text = (
        rng.choice(SYSTEMS)
        if rng.random() < 0.7
        else "You are a %s %s. %s" % (rng.choice(w.ADJECTIVES), rng.choice(w.JOBS), lists.sentence(rng))
    )
    return [system(text)] + messages


def plain_dialogue(rng):
    turns = rng.choices((1, 2, 3, 4), (60, 20, 12, 8))[0]
    messages = []
    for func in rng.choices(FUNCS, ODDS, k=turns):
        question, reply, think = func(rng)
        if func in SPOKEN:
            question = tasks.loosely(rng, question)
        messages += [user(question), assistant(reply, think)]
    return render(with_system(rng, messages), None, rng.random() < 0.5)


# ---------------------------------------------------------------- memory of the conversation
def personal_facts(rng):
    """(statement, reply, question, answer) about the user or others, with words drawn anew each time."""
    name, thing, place = rng.choice(w.NAMES), rng.choice(w.OBJECTS), rng.choice(w.PLACES)
    color, city, job, hobby = rng.choice(w.COLORS), rng.choice(w.CITIES), rng.choice(w.JOBS), rng.choice(w.HOBBIES)
    number, animal, pet = rng.randint(2, 99999), rng.choice(w.ANIMALS), rng.choice(w.NAMES)
    nod = x.pick(rng, "I will remember that.", "All right, noted.", "Thank you, I will keep that in mind.")
    return rng.choice(
        [
            (
                x.pick(rng, "My name is %s.", "Hi, my name is %s.", "Hello, I am %s.", "I'm %s.", "Call me %s.") % name,
                "Nice to meet you, %s!" % name,
                x.pick(rng, "What is my name?", "Who am I?", "Do you remember my name?"),
                "Your name is %s." % name,
            ),
            ("I live in %s." % city, nod, "Where do I live?", "You live in %s." % city),
            ("I am a %s." % job, nod, "What is my job?", "You are a %s." % job),
            ("I like %s." % hobby, nod, "What do I like?", "You like %s." % hobby),
            (
                "My favorite color is %s." % color,
                nod,
                "What is my favorite color?",
                "Your favorite color is %s." % color,
            ),
            (
                "I have a %s called %s." % (animal, pet),
                nod,
                "What is my %s called?" % animal,
                "Your %s is called %s." % (animal, pet),
            ),
            (
                "The %s is in the %s." % (thing, place),
                nod,
                "Where is the %s?" % thing,
                "The %s is in the %s." % (thing, place),
            ),
            (
                "%s has a %s %s." % (name, color, thing),
                nod,
                "What color is the %s of %s?" % (thing, name),
                "The %s of %s is %s." % (thing, name, color),
            ),
            ("My number is %d." % number, nod, "What is my number?", "Your number is %d." % number),
            (
                "Remember the number %d." % number,
                nod,
                "Which number did I tell you?",
                "You told me the number %d." % number,
            ),
            ("The password is %s." % (color + rng.choice(w.OBJECTS)), nod, "", ""),
            ("%s lives in %s." % (name, city), nod, "Where does %s live?" % name, "%s lives in %s." % (name, city)),
            ("%s is a %s." % (name, job), nod, "What is the job of %s?" % name, "%s is a %s." % (name, job)),
        ]
    )


def memory_dialogue(rng):
    facts = {}
    while len(facts) < rng.randint(1, 4):
        statement, reply, question, answer = personal_facts(rng)
        if question:
            facts[question] = (statement, reply, answer)
    messages = []
    if rng.random() < 0.4:  # all in one message
        asked = rng.choice(list(facts))
        messages = [user(" ".join(f[0] for f in facts.values()) + " " + asked), assistant(facts[asked][2])]
    else:
        for statement, reply, _ in facts.values():
            messages += [user(statement), assistant(reply)]
        for func in rng.choices(FUNCS, ODDS, k=rng.randint(0, 2)):
            question, reply, think = func(rng)
            messages += [user(question), assistant(reply, think)]
        for asked in rng.sample(list(facts), len(facts)):
            messages += [user(asked), assistant(facts[asked][2])]
    return render(with_system(rng, messages), None, rng.random() < 0.5)


# ---------------------------------------------------------------- tools
KNOWN = [
    (
        "get_weather",
        "Get the current weather for a city.",
        {"city": "city"},
        [
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "Is it raining in {city}?",
            "Weather in {city}",
            "What's the weather like in {city}?",
            "Tell me the weather in {city}.",
            "How warm is it in {city}?",
        ],
    ),
    (
        "get_current_weather",
        "Get the current weather in a given location",
        {"location": "city"},
        [
            "What is the weather in {location}?",
            "What's the weather like in {location} today?",
            "Weather in {location}?",
        ],
    ),
    (
        "get_weather",
        "Get weather information.",
        {"location": "city", "unit": "unit"},
        [
            "What is the weather in {location} in {unit}?",
            "How warm is it in {location} in {unit}?",
            "Weather in {location}, {unit} please.",
        ],
    ),
    (
        "get_time",
        "Get the current time in a city.",
        {"city": "city"},
        ["What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"],
    ),
    (
        "add",
        "Add two numbers.",
        {"a": "number", "b": "number"},
        ["Add {a} and {b}.", "What is {a} plus {b}?", "Use the tool to add {a} and {b}."],
    ),
    (
        "multiply",
        "Multiply two numbers.",
        {"a": "number", "b": "number"},
        ["Multiply {a} by {b}.", "What is {a} times {b}?"],
    ),
    (
        "calculator",
        "Evaluate an arithmetic expression.",
        {"expression": "expr"},
        ["Calculate {expression}.", "What is {expression}?", "Compute {expression}"],
    ),
    (
        "search",
        "Search the web.",
        {"query": "phrase"},
        ["Search for {query}.", "Look up {query}.", "Find something about {query}."],
    ),
    (
        "send_email",
        "Send an email.",
        {"recipient": "name", "subject": "phrase"},
        ["Send an email to {recipient} about {subject}.", "Write {recipient} an email about {subject}."],
    ),
    ("set_alarm", "Set an alarm.", {"time": "time"}, ["Set an alarm for {time}.", "Wake me at {time}."]),
    (
        "translate",
        "Translate a word.",
        {"text": "word", "language": "lang"},
        ["Translate {text} into {language}.", "How do you say {text} in {language}?"],
    ),
    (
        "lookup_order",
        "Look up an order by its number.",
        {"order_id": "number"},
        ["Where is order {order_id}?", "Look up order {order_id}.", "What is the status of order {order_id}?"],
    ),
    (
        "turn_on_light",
        "Turn on the light in a room.",
        {"room": "place"},
        ["Turn on the light in the {room}.", "Light on in the {room}, please."],
    ),
    (
        "get_stock_price",
        "Get the price of a stock.",
        {"symbol": "symbol"},
        ["What is the price of {symbol}?", "How much is {symbol} stock?"],
    ),
]


def value(rng, kind):
    return {
        "city": lambda: rng.choice(w.CITIES),
        "name": lambda: rng.choice(w.NAMES),
        "color": lambda: rng.choice(w.COLORS),
        "object": lambda: rng.choice(w.OBJECTS),
        "animal": lambda: rng.choice(w.ANIMALS),
        "fruit": lambda: rng.choice(w.FRUITS),
        "day": lambda: rng.choice(w.DAYS),
        "month": lambda: rng.choice(w.MONTHS),
        "number": lambda: rng.randint(1, rng.choice((9, 99, 999, 99999))),
        "phrase": lambda: lists.phrase(rng, 1, 3),
        "place": lambda: rng.choice(w.PLACES),
        "word": lambda: rng.choice(w.WORDS),
        "lang": lambda: rng.choice(("French", "German", "Spanish", "Italian")),
        "time": lambda: "%d:%02d" % (rng.randint(0, 23), rng.randint(0, 59)),
        "expr": lambda: "%d %s %d" % (rng.randint(1, 999), rng.choice("+-*"), rng.randint(1, 999)),
        "unit": lambda: rng.choice(("celsius", "fahrenheit")),
        "symbol": lambda: "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(2, 4))),
    }[kind]()


def made_up_tool(rng):
    name = rng.choice(w.TOOL_VERBS) + "_" + rng.choice(w.TOOL_NOUNS)
    params = dict(rng.choice(list(w.TOOL_PARAMS.items())) for _ in range(rng.randint(1, 3)))
    spoken = name.replace("_", " ")
    asks = [
        "{spoken} with " + " and ".join("%s {%s}" % (p, p) for p in params) + ".",
        "Please {spoken}: " + ", ".join("%s {%s}" % (p, p) for p in params) + ".",
    ]
    if rng.random() < 0.5:
        asks = [a.replace("{spoken}", "call " + name) for a in asks]
    return name, x.pick(rng, "", "Tool to ") + spoken + ".", params, [a.replace("{spoken}", spoken) for a in asks]


def schema(rng, tool):
    name, description, params, _ = tool
    props = {}
    for p, kind in params.items():
        props[p] = {"type": "integer" if kind == "number" else "string"}
        if kind == "unit":
            props[p]["enum"] = ["celsius", "fahrenheit"]
        elif rng.random() < 0.4:
            props[p]["description"] = x.pick(rng, "The %s.", "the %s", "The %s to use") % p.replace("_", " ")
    function = {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": props, "required": list(params)},
    }
    return {"type": "function", "function": function}


def outcome(rng, tool, args):
    """(tool response, the sentence that reports it)."""
    name = tool[0]
    if "weather" in name:
        degrees, sky = rng.randint(-9, 39), rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "clear"))
        where = list(args.values())[0]
        body = rng.choice(
            [
                {"temperature": degrees, "condition": sky},
                {"temp_c": degrees, "sky": sky},
                {"city": where, "temperature": degrees, "condition": sky},
            ]
        )
        return dumps(body), "It is %s in %s with %d degrees." % (sky, where, degrees)
    if name in ("add", "multiply"):
        result = args["a"] + args["b"] if name == "add" else args["a"] * args["b"]
        return str(result), "The result is %d." % result
    result = x.pick(
        rng,
        str(rng.randint(0, 99999)),
        rng.choice(w.WORDS),
        rng.choice(("ok", "done", "sent", "open", "closed", "ready", "shipped")),
        lists.phrase(rng, 2, 4),
    )
    field = rng.choice(("result", "status", "value", "answer"))
    return x.pick(rng, result, dumps({field: result})), "The result is %s." % result


def tool_dialogue(rng):
    tools = [
        rng.choice(KNOWN) if rng.random() < 0.55 else made_up_tool(rng)
        for _ in range(rng.choices((1, 2, 3), (60, 25, 15))[0])
    ]
    tools = list({t[0]: t for t in tools}.values())
    schemas = [schema(rng, t) for t in tools]
    thinking = rng.random() < 0.5
    lead = []
    if rng.random() < 0.15:
        question, reply, _ = x.greeting(rng)
        lead = [user(question), assistant(reply)]
    if rng.random() < 0.15:  # a question that needs no tool
        question, reply, _ = rng.choice((x.greeting, x.identity, lists.copying))(rng)
        return render(with_system(rng, lead + [user(question), assistant(reply)]), schemas, thinking)
    tool = rng.choice(tools)
    args = {p: value(rng, kind) for p, kind in tool[2].items()}
    ask = rng.choice(tool[3]).format(**args)
    ask = ask[0].upper() + ask[1:]
    messages = with_system(rng, lead + [user(ask), tool_call(tool[0], args)])
    if rng.random() < 0.4:
        response, report = outcome(rng, tool, args)
        messages += [tool_result(response), assistant(report)]
    return render(messages, schemas, thinking)


def make_dialogue(rng):
    kind = rng.random()
    if kind < 0.62:
        return plain_dialogue(rng)
    if kind < 0.74:
        return memory_dialogue(rng)
    return tool_dialogue(rng)
