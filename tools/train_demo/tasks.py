"""More kinds of exchange: JSON, odd strings, text about text, and messages the model cannot make sense of.

Same contract as exchanges.py: (user text, reply, thoughts), drawn from the given random.Random only.
"""

import string

import wordlists as w
from chat import dumps
from exchanges import pick
from lists import phrase, sentence

CHARACTERS = string.ascii_letters + string.digits + "-_./:+#@"


def odd_string(rng):
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(3, 16)))
    if kind == 1:
        return "-".join("".join(rng.choice("0123456789abcdef") for _ in range(4)) for _ in range(rng.randint(1, 4)))
    if kind == 2:
        return rng.choice(w.NAMES).lower() + "@" + rng.choice(w.WORDS) + rng.choice((".com", ".org", ".net"))
    if kind == 3:
        return "%d.%d.%d.%d" % tuple(rng.randint(0, 255) for _ in range(4))
    return " ".join(
        "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 7))) for _ in range(rng.randint(1, 6))
    )


def odd_copy(rng):
    text = odd_string(rng)
    ask = pick(
        rng,
        "Repeat: %s",
        "Copy this: %s",
        "Write exactly this: %s",
        "Say %s",
        "Echo: %s",
        "repeat %s",
        "Repeat this code: %s",
        "Please write %s",
        "Repeat the following:\n%s",
    )
    return ask % text, text, ""


def sentence_copy(rng):
    text = " ".join(sentence(rng) for _ in range(rng.randint(1, 4)))
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:-1]
    ask = pick(
        rng,
        "Repeat after me: %s",
        "Repeat: %s",
        "Say: %s",
        "Repeat this sentence: %s",
        "Copy this text:\n%s",
        "Echo: %s",
    )
    return ask % text, text, ""


def record(rng):
    fields = {
        "name": rng.choice(w.NAMES),
        "age": rng.randint(1, 99),
        "city": rng.choice(w.CITIES),
        "color": rng.choice(w.COLORS),
        "animal": rng.choice(w.ANIMALS),
        "count": rng.randint(0, 999),
        "job": rng.choice(w.JOBS),
        "active": rng.random() < 0.5,
        "fruit": rng.choice(w.FRUITS),
        "id": rng.randint(1, 99999),
    }
    return {k: fields[k] for k in rng.sample(list(fields), rng.randint(1, 4))}


def json_object(rng):
    kind = rng.randrange(3)
    if kind == 0:
        fields = record(rng)
        said = " and ".join("%s %s" % (k, dumps(v).strip('"')) for k, v in fields.items())
        return (
            pick(rng, "Write a JSON object with %s.", "Give me JSON with %s.", "Make a JSON object: %s") % said,
            dumps(fields),
            "",
        )
    if kind == 1:
        name, age, city = rng.choice(w.NAMES), rng.randint(1, 99), rng.choice(w.CITIES)
        text = "%s is %d years old and lives in %s." % (name, age, city)
        return (
            pick(rng, "Extract name, age and city as JSON: %s", "Turn this into JSON with name, age and city: %s")
            % text,
            dumps({"name": name, "age": age, "city": city}),
            "",
        )
    items = rng.sample(rng.choice((w.ANIMALS, w.FRUITS, w.COLORS, w.NAMES)), rng.randint(2, 6))
    return (
        pick(rng, "Write this as a JSON array: %s", "Turn this list into a JSON array: %s", "As a JSON list: %s")
        % ", ".join(items),
        dumps(items),
        "",
    )


def word_question(rng):
    kind = rng.randrange(6)
    words = [rng.choice(w.WORDS) for _ in range(rng.randint(2, 7))]
    text = " ".join(words)
    if kind == 0:
        return (
            pick(rng, 'What is the last word of "%s"?', 'Which word is last in "%s"?') % text,
            'The last word is "%s".' % words[-1],
            "",
        )
    if kind == 1:
        return (
            pick(rng, 'What is the first word of "%s"?', 'Which word is first in "%s"?') % text,
            'The first word is "%s".' % words[0],
            "",
        )
    if kind == 2:
        return (
            pick(rng, "How many words are there: %s?", 'Count the words in "%s".', 'How many words are in "%s"?')
            % text,
            "There are %d words." % len(words),
            " ".join("%d: %s." % (i + 1, x) for i, x in enumerate(words)),
        )
    if kind == 3:
        word = rng.choice(w.WORDS)
        return pick(rng, 'Spell "%s".', "Spell the word %s.", "How do you spell %s?") % word, "-".join(word), ""
    if kind == 4:
        has = rng.random() < 0.5
        word = rng.choice(words) if has else rng.choice([x for x in w.WORDS if x not in words])
        reply = 'Yes, the list contains "%s".' if has else 'No, the list does not contain "%s".'
        return 'Does the list %s contain "%s"?' % (", ".join(words), word), reply % word, ""
    name, other, verb = rng.choice(w.NAMES), rng.choice(w.NAMES), pick(rng, "helps", "calls", "visits", "thanks")
    return "%s %s %s. Who %s %s?" % (name, verb, other, verb, other), "%s %s %s." % (name, verb, other), ""


def puzzled(rng):
    """Something off any subject: the honest reply is short."""
    text = pick(
        rng, odd_string(rng), phrase(rng, 1, 5), sentence(rng), "?", "...", "asdf", "Why?", "What?", "Really?", "Hmm"
    )
    if len(text) < 8 and rng.random() < 0.5:
        return text, "Could you say that in other words?", ""
    return (
        text,
        pick(
            rng,
            "I see. What would you like me to do with it?",
            "I am not sure what you mean. Could you say that in other words?",
        ),
        "",
    )


def loosely(rng, text):
    """The same message as people type it: other case, no full stop, a polite word."""
    kind = rng.random()
    if kind < 0.15:
        text = text[0].lower() + text[1:]
    elif kind < 0.22 and text[-1:] in ".?!":
        text = text[:-1]
    elif kind < 0.28 and text[-1:] in ".?!":
        text = text[0].lower() + text[1:-1]
    elif kind < 0.33 and text[-1:] == ".":
        text = "Please " + text[0].lower() + text[1:]
    elif kind < 0.36 and text[-1:] == "?":
        text = pick(rng, "Can you tell me: ", "Tell me: ", "Hi! ", "Question: ", "Hello, ") + text
    elif kind < 0.38:
        text = text + pick(rng, " ", "\n", "!", " please", " Thanks!")
    return text
