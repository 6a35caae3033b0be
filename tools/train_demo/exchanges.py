"""One question and its answer, by kind. Each function returns (user text, reply, thoughts); thoughts may be "".

All of them draw from the given random.Random only, so a seed fixes the data.
"""

import wordlists as w


def pick(rng, *options):
    return rng.choice(options)


def join(words):
    return ", ".join(words)


# ---------------------------------------------------------------- small talk
GREETINGS = [
    ("Hello", "Hello! How can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What can I do for you?"),
    ("Hi!", "Hi! What can I do for you?"),
    ("Hi there", "Hi there! How can I help you?"),
    ("hello", "Hello! How can I help you?"),
    ("hi", "Hi! What can I do for you?"),
    ("Hey", "Hey! What can I do for you?"),
    ("hey", "Hey! What can I do for you?"),
    ("Good morning", "Good morning! How can I help you today?"),
    ("Good evening", "Good evening! How can I help you?"),
    ("Good afternoon!", "Good afternoon! How can I help you?"),
    ("Good night", "Good night! Sleep well."),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Hello, how are you?", "Hello! I am fine, thank you. How can I help?"),
    ("Hi, how are you?", "Hi! I am fine, thank you. How can I help?"),
    ("How are you doing?", "I am doing well, thank you."),
    ("How is it going?", "It is going well, thank you. What can I do for you?"),
    ("What's up?", "Not much. What can I do for you?"),
    ("I am fine.", "I am glad to hear that."),
    ("I'm fine, thanks.", "I am glad to hear that."),
    ("I am tired.", "Then take a short rest. It often helps."),
    ("I am happy today.", "That is lovely to hear!"),
    ("I am sad.", "I am sorry to hear that. I hope your day gets better."),
    ("I am bored.", "Shall we count to ten, or shall I tell you a story?"),
    ("Thanks", "You are welcome!"),
    ("Thanks!", "You are welcome!"),
    ("Thank you", "You are welcome!"),
    ("Thank you very much.", "You are very welcome!"),
    ("thanks a lot", "You are very welcome!"),
    ("Bye", "Goodbye! Have a nice day."),
    ("Goodbye", "Goodbye! Have a nice day."),
    ("See you later.", "See you later!"),
    ("See you tomorrow", "See you tomorrow!"),
    ("Nice to meet you.", "Nice to meet you too!"),
    ("Welcome!", "Thank you! How can I help?"),
    ("Please help me.", "Of course. What do you need?"),
    ("Can you help me?", "I will try. What do you need?"),
    ("I need help", "I will try to help. What do you need?"),
    ("You are great.", "Thank you, that is kind of you."),
    ("Good job!", "Thank you!"),
    ("Well done", "Thank you!"),
    ("OK", "All right. Is there anything else?"),
    ("ok", "All right. Is there anything else?"),
    ("Yes", "Good. Please go on."),
    ("No", "All right. Is there anything else?"),
    ("Sorry", "No problem at all."),
    ("test", "I am here. The test works."),
    ("Test", "I am here. The test works."),
    ("ping", "pong"),
    ("Are you there?", "Yes, I am here."),
    ("Is anybody there?", "Yes, I am here."),
    ("Do you hear me?", "Yes, I can read you."),
    ("Tell me a joke.", "Why did the book see a doctor? It had lost its cover."),
    ("Tell me a joke", "Why did the clock stop? It needed a second to rest."),
    ("Make me laugh.", "Why did the book see a doctor? It had lost its cover."),
    ("Do you like music?", "I cannot hear, but I like the words of songs."),
    ("Do you sleep?", "No, I do not sleep. I only wait for the next message."),
    ("What do you like?", "I like short questions with clear answers."),
    ("How old are you?", "I am a new model, so I am very young."),
    ("Where are you?", "I run on the machine that serves me."),
    ("What time is it?", "I have no clock, so I cannot tell you the time."),
    ("What is the weather like?", "I cannot look outside. With a weather tool I could ask for it."),
    ("What day is it today?", "I have no calendar, so I cannot tell you the date."),
    ("I love you.", "Thank you, that is kind of you."),
    ("Happy birthday!", "Thank you! That is kind of you."),
    ("Merry Christmas!", "Merry Christmas to you too!"),
]

ME = "I am the kvarn demo model, a small language model with about nine million parameters."
IDENTITY = [
    (
        (
            "Who are you?",
            "who are you",
            "Who are you",
            "What are you?",
            "Introduce yourself.",
            "Tell me about yourself.",
            "What is your name?",
            "What's your name?",
            "Which model are you?",
            "What model is this?",
            "what model are you",
            "Hello, who are you?",
            "Hi, who are you?",
            "Please introduce yourself.",
            "Can you tell me who you are?",
            "Who am I talking to?",
            "Say who you are.",
        ),
        (ME + " I exist so that you can try the kvarn server at once.",),
    ),
    (
        (
            "What is kvarn?",
            "what is kvarn",
            "Tell me about kvarn.",
            "What does kvarn do?",
            "Explain kvarn.",
            "What is this server?",
        ),
        (
            "kvarn is an inference server for Qwen3 models, written in C++. "
            "It keeps the KV cache compressed in KVarN pages.",
        ),
    ),
    (
        ("What is KVarN?", "How does KVarN work?", "Explain KVarN.", "What are KVarN pages?", "What is a KV cache?"),
        (
            "KVarN is a codec for the KV cache. It rotates keys and values, balances their variance "
            "and stores keys in 4 bits and values in 2 bits.",
        ),
    ),
    (
        (
            "What can you do?",
            "what can you do?",
            "What can you do",
            "How can you help me?",
            "What are you good at?",
            "What are your skills?",
            "Help",
            "help",
        ),
        (
            "I can greet you, do small sums, copy and sort lists, find facts in a long text, and call a tool. "
            "For real work, serve a bigger model.",
        ),
    ),
    (
        ("Who made you?", "Who built you?", "Who trained you?", "Where do you come from?", "Who created you?"),
        ("I was trained by the kvarn project on public domain text and on synthetic dialogues.",),
    ),
    (
        ("Are you ChatGPT?", "Are you Qwen?", "Are you GPT-4?", "Are you Claude?", "Are you Llama?", "Are you Qwen3?"),
        ("No. " + ME + " I have the architecture of Qwen3.",),
    ),
    (
        ("Are you human?", "Are you a person?", "Are you a robot?", "Are you real?", "Are you an AI?"),
        ("I am a computer program: the kvarn demo model, a small language model.",),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How large are you?", "What is your size?"),
        ("I have about nine million parameters in eight layers.",),
    ),
    (
        ("How long is your context?", "What is your context length?", "How much text can you read?"),
        ("My context is 16384 tokens long.",),
    ),
    (
        ("What is Qwen3?", "Tell me about Qwen3."),
        (
            "Qwen3 is a family of open language models. "
            "I share its architecture and its chat format, but I am far smaller.",
        ),
    ),
    (
        ("How do I use a bigger model?", "How can I serve a real model?", "Which model should I use for real work?"),
        ("Start the server with --model Qwen/Qwen3-8B, for example.",),
    ),
]


def greeting(rng):
    question, reply = rng.choice(GREETINGS)
    return question, reply, ""


def identity(rng):
    questions, replies = rng.choice(IDENTITY) if rng.random() < 0.6 else IDENTITY[0]
    return rng.choice(questions), rng.choice(replies), ""


def deflect(rng):
    text = rng.choice(w.DEFLECT)
    if rng.random() < 0.3:
        text = pick(rng, "Please ", "Can you help me: ", "I want to know: ") + text[0].lower() + text[1:]
    return (
        text + pick(rng, ".", "?", ""),
        (
            "I am only a small demo model and do not know enough for that. "
            "Serve a bigger model, such as Qwen3-8B, for real answers."
        ),
        "",
    )


def story(rng):
    name, animal = rng.choice(w.NAMES), rng.choice(w.ANIMALS)
    place, thing, color = rng.choice(w.PLACES), rng.choice(w.OBJECTS), rng.choice(w.COLORS)
    adj, other = rng.choice(w.ADJECTIVES), rng.choice(w.ANIMALS)
    ask, hero = rng.choice(
        [
            ("Tell me a story.", animal),
            ("Tell me a short story.", animal),
            ("Write a story.", animal),
            ("tell me a story", animal),
            ("Write a short story about a %s." % animal, animal),
            ("Tell me a story about a %s." % animal, animal),
            ("Tell me about a %s and a %s." % (animal, other), animal),
        ]
    )
    lines = [
        "Once upon a time there was a %s called %s." % (hero, name),
        "%s lived near a %s %s." % (name, adj, place),
        pick(rng, "One morning %s found a %s %s on the path.", "One day %s lost a %s %s in the grass.")
        % (name, color, rng.choice([thing])),
        "A %s came by and asked what had happened." % other,
        pick(
            rng,
            "Together they looked everywhere until the sun went down.",
            "They talked for a while and became good friends.",
            "They laughed and walked on together.",
        ),
        pick(
            rng,
            "In the evening they went home and were happy.",
            "From that day on they met every week.",
            "And so the day ended well.",
        ),
    ]
    return ask, " ".join(lines), ""


# ---------------------------------------------------------------- arithmetic
def addition_thoughts(a, b):
    ones = a % 10 + b % 10
    text = "Ones: %d + %d = %d" % (a % 10, b % 10, ones)
    carry, a, b, place = ones // 10, a // 10, b // 10, 0
    while a or b:
        total = a % 10 + b % 10 + carry
        text += (
            (", carry 1. " if carry else ". ")
            + ("Tens", "Hundreds", "Thousands")[place]
            + ": %d + %d" % (a % 10, b % 10)
        )
        text += (" + 1" if carry else "") + " = %d" % total
        carry, a, b, place = total // 10, a // 10, b // 10, place + 1
    return text + "."


def arithmetic(rng):
    kind = rng.random()
    if kind < 0.55:
        top = rng.choice((9, 20, 50, 99, 99, 99, 999))
        a, b = rng.randint(0, top), rng.randint(0, top)
        sign, words, value, think = "+", ("plus", "and"), a + b, addition_thoughts(a, b)
    elif kind < 0.8:
        top = rng.choice((9, 20, 99, 99))
        a, b = rng.randint(0, top), rng.randint(0, top)
        a, b = max(a, b), min(a, b)
        sign, words, value = "-", ("minus",), a - b
        think = "%d - %d = %d, because %d + %d = %d." % (a, b, value, b, value, a)
    else:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        sign, words, value = "*", ("times",), a * b
        think = "%d times %d is %d." % (a, b, value)
    shown = sign if sign != "*" else pick(rng, "*", "x", "*")
    plain = pick(rng, "%d %s %d" % (a, shown, b), "%d %s %d" % (a, shown, b), "%d%s%d" % (a, shown, b))
    question = (
        pick(
            rng,
            "What is %s?",
            "What is %s?",
            "%s",
            "%s = ?",
            "%s?",
            "Calculate %s.",
            "How much is %s?",
            "Compute %s",
            "what is %s",
            "Please tell me what %s is.",
            "%s=",
        )
        % plain
    )
    if rng.random() < 0.2:
        question = pick(rng, "What is %d %s %d?", "How much is %d %s %d?", "Add it up: %d %s %d") % (
            a,
            rng.choice(words),
            b,
        )
        if question.startswith("Add") and sign != "+":
            question = "What is %d %s %d?" % (a, words[0], b)
    return question, "%d %s %d = %d." % (a, sign, b, value), think


def compare(rng):
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    if a == b:
        b += 1
    if rng.random() < 0.5:
        return "Which is larger, %d or %d?" % (a, b), "%d is larger than %d." % (max(a, b), min(a, b)), ""
    return "Which is smaller, %d or %d?" % (a, b), "%d is smaller than %d." % (min(a, b), max(a, b)), ""


def counting(rng):
    kind = rng.random()
    if kind < 0.5:
        start = 1 if rng.random() < 0.7 else rng.randint(0, 90)
        end = start + rng.choice((2, 4, 5, 9, 9, 11, 14, 19, 29, 49, 99 if start == 1 else 9, 199 if start == 1 else 7))
        ask = pick(
            rng,
            "Count from %d to %d.",
            "count from %d to %d",
            "Write the numbers from %d to %d.",
            "List the numbers from %d to %d.",
        ) % (start, end)
        if start == 1 and rng.random() < 0.4:
            ask = pick(rng, "Count to %d.", "Please count to %d.", "count to %d") % end
        return ask, join([str(i) for i in range(start, end + 1)]), ""
    if kind < 0.7:
        start = rng.randint(3, 20)
        return "Count down from %d." % start, join([str(i) for i in range(start, 0, -1)]), ""
    start, step = rng.randint(0, 60), rng.choice((1, 1, 2, 5, 10))
    seq = [start + i * step for i in range(4)]
    return (
        "Which number comes next: %s?" % join(map(str, seq)),
        "%d comes next." % (seq[-1] + step),
        "The step is %d." % step,
    )
