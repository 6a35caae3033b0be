"""Exchanges about words: copies, lists and small facts. Same contract as exchanges.py."""

import wordlists as w
from exchanges import join, pick


# ---------------------------------------------------------------- copies and lists
def phrase(rng, low=1, high=8):
    return " ".join(rng.choice(w.WORDS) for _ in range(rng.randint(low, high)))


def sentence(rng):
    return pick(
        rng,
        "The {a} {p} is near the {q}.",
        "{n} has a {c} {o}.",
        "The {x} likes the {y}.",
        "{n} lives in {t}.",
        "My {o} is in the {p}.",
        "{n} and {m} are in {t}.",
    ).format(
        a=rng.choice(w.ADJECTIVES),
        p=rng.choice(w.PLACES),
        q=rng.choice(w.PLACES),
        n=rng.choice(w.NAMES),
        m=rng.choice(w.NAMES),
        c=rng.choice(w.COLORS),
        o=rng.choice(w.OBJECTS),
        x=rng.choice(w.ANIMALS),
        y=rng.choice(w.ANIMALS),
        t=rng.choice(w.CITIES),
    )


def copying(rng):
    kind = rng.random()
    text = pick(
        rng,
        sentence(rng),
        phrase(rng),
        phrase(rng),
        "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 12))),
        "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9))),
    )
    if kind < 0.7:
        ask = (
            pick(
                rng,
                "Repeat: %s",
                "Repeat after me: %s",
                "Say: %s",
                "Copy this: %s",
                "Please repeat this text: %s",
                "Write exactly this: %s",
                "Echo: %s",
                "Repeat the following:\n%s",
                'Say "%s"',
            )
            % text
        )
        return ask, text, ""
    times = rng.randint(2, 5)
    word = rng.choice(w.WORDS)
    return (
        pick(rng, "Say %s %d times.", 'Write the word "%s" %d times.', "Repeat %s %d times.") % (word, times),
        " ".join([word] * times),
        "",
    )


def listing(rng):
    source = rng.choice((w.ANIMALS, w.FRUITS, w.OBJECTS, w.COLORS, w.NAMES, w.CITIES))
    items = rng.sample(source, rng.randint(3, 7))
    n = len(items)
    shown = join(items)
    numbered = " ".join("%d: %s." % (i + 1, x) for i, x in enumerate(items))
    kind = rng.randrange(10)
    lead = pick(rng, "Here is a list: %s.\n", "The list is %s. ", "%s. ", "List: %s\n") % shown
    if kind == 0:
        return (
            lead + pick(rng, "What is the first item?", "Which item is first?", "What comes first?"),
            "The first item is %s." % items[0],
            "",
        )
    if kind == 1:
        return (
            lead + pick(rng, "What is the last item?", "Which item is last?", "What comes last?"),
            "The last item is %s." % items[-1],
            "",
        )
    if kind == 2:
        i = rng.randrange(min(n, 5))
        which = ("first", "second", "third", "fourth", "fifth")[i]
        return lead + "What is the %s item?" % which, "The %s item is %s." % (which, items[i]), numbered
    if kind == 3:
        return (
            lead + pick(rng, "How many items are in the list?", "How many items are there?", "Count the items."),
            "There are %d items." % n,
            numbered,
        )
    if kind == 4:
        return pick(rng, "Reverse this list: %s", "Write this list backwards: %s") % shown, join(items[::-1]), numbered
    if kind == 5:
        return (
            pick(rng, "Sort this list: %s", "Sort alphabetically: %s", "Put these in alphabetical order: %s") % shown,
            join(sorted(items)),
            "",
        )
    if kind == 6:
        numbers = rng.sample(range(0, 100), rng.randint(3, 6))
        return (
            pick(rng, "Sort these numbers: %s", "Sort: %s", "Put these numbers in order: %s") % join(map(str, numbers)),
            join(map(str, sorted(numbers))),
            "",
        )
    if kind == 7:
        return (
            pick(rng, "Make a bulleted list: %s", "Write as a list: %s", "Turn this into a list: %s") % shown,
            "\n".join("- " + x for x in items),
            "",
        )
    if kind == 8:
        return (
            pick(rng, "Make a numbered list: %s", "Number these: %s") % shown,
            "\n".join("%d. %s" % (i + 1, x) for i, x in enumerate(items)),
            "",
        )
    i = rng.randrange(n - 1)
    return lead + "What comes after %s?" % items[i], "%s comes after %s." % (items[i + 1], items[i]), ""


# ---------------------------------------------------------------- small facts
def fact(rng):
    kind = rng.randrange(7)
    if kind == 0:
        country, city = rng.choice(list(w.CAPITALS.items()))
        ask = (
            pick(
                rng,
                "What is the capital of %s?",
                "what is the capital of %s",
                "Name the capital of %s.",
                "Capital of %s?",
            )
            % country
        )
        return ask, "The capital of %s is %s." % (country, city), ""
    if kind == 1:
        one, other = rng.choice(list(w.OPPOSITES.items()))
        if rng.random() < 0.5:
            one, other = other, one
        return (
            pick(rng, "What is the opposite of %s?", "Opposite of %s?") % one,
            "The opposite of %s is %s." % (one, other),
            "",
        )
    if kind == 2:
        animal, sound = rng.choice(list(w.SOUNDS.items()))
        return "What does a %s say?" % animal, "The %s says %s." % (animal, sound), ""
    if kind == 3:
        names, what = rng.choice(((w.DAYS, "day"), (w.MONTHS, "month")))
        i = rng.randrange(len(names))
        if rng.random() < 0.5:
            return (
                "What %s comes after %s?" % (what, names[i]),
                "%s comes after %s." % (names[(i + 1) % len(names)], names[i]),
                "",
            )
        return "What %s comes before %s?" % (what, names[i]), "%s comes before %s." % (names[i - 1], names[i]), ""
    if kind == 4:
        names, what = rng.choice(((w.DAYS, "days of the week"), (w.MONTHS, "months of the year")))
        return pick(rng, "List the %s.", "Name the %s.", "What are the %s?") % what, join(names), ""
    if kind == 5:
        names, what = rng.choice(
            ((w.ANIMALS, "animals"), (w.FRUITS, "fruits"), (w.COLORS, "colors"), (w.CITIES, "cities"))
        )
        n = rng.randint(2, 6)
        return pick(rng, "Name %d %s.", "List %d %s.", "Give me %d %s.") % (n, what), join(rng.sample(names, n)), ""
    words = ((w.ANIMALS, "an animal"), (w.FRUITS, "a fruit"), (w.COLORS, "a color"), (w.CITIES, "a city"))
    i = rng.randrange(4)
    if rng.random() < 0.5:
        word = rng.choice(words[i][0])
        return "Is %s %s?" % (word, words[i][1]), "Yes, %s is %s." % (word, words[i][1]), ""
    pools = [set(p) for p, _ in words]
    word = rng.choice([x for x in w.WORDS if x not in pools[i]])
    return "Is %s %s?" % (word, words[i][1]), "No, %s is not %s." % (word, words[i][1]), ""
