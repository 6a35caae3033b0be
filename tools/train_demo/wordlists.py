"""Words that the synthetic dialogues are made of. Plain data, no logic."""

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ivy Jack Kate Leo Maya Noah Olivia Paul Quinn Rosa Sam Tara
Uma Victor Wendy Xavier Yara Zoe Alice Bob Carlos Diana Erik Fatima George Hannah Ivan Julia Karim Laura Marco Nina
Omar Peter Rita Simon Tom Ursula Vera Walter Yusuf Lena""".split()

ADJECTIVES = """amber silver crimson golden silent hidden ancient frozen copper violet emerald marble wooden velvet
scarlet ivory cobalt rusty narrow distant crystal misty broken lonely gentle hollow bright stormy quiet iron purple
orange yellow green blue white black crooked sunken painted northern southern eastern western polished dusty
flying sleepy curious noble""".split()

PLACES = """lighthouse harbor garden tower library bridge castle market museum station temple valley forest island
river mountain meadow cellar kitchen workshop observatory theater chapel fountain orchard windmill tunnel vault
cabin gallery school bakery stable monastery palace laboratory warehouse greenhouse cottage mill quarry reservoir
airport embassy hospital archive canyon lagoon glacier vineyard""".split()

ANIMALS = """cat dog horse rabbit fox bear owl wolf mouse lion tiger eagle dolphin whale frog duck goose sheep goat
cow pig hen turtle snake deer otter badger hedgehog squirrel parrot penguin seal crow swan beaver""".split()

FRUITS = """apple pear plum cherry grape lemon orange banana peach mango melon fig olive apricot kiwi lime papaya
raspberry strawberry blueberry""".split()

OBJECTS = """key lamp chair table book clock mirror bottle box ladder hammer candle ring map coin letter basket
blanket bucket ticket camera pencil umbrella violin telescope compass wallet jacket kettle teapot notebook
suitcase bicycle guitar phone laptop helmet lantern""".split()

COLORS = "red blue green yellow white black purple orange brown grey pink silver golden".split()

CITIES = """Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Stockholm Helsinki Warsaw Prague Athens Cairo
Tokyo Beijing Delhi Sydney Toronto Chicago Boston Denver Seattle Lima Bogota Nairobi Lagos Istanbul Zurich Geneva
Munich Hamburg Milan Naples Barcelona Valencia Lyon Brussels Amsterdam""".split()

CAPITALS = dict(pair.split(":") for pair in """France:Paris Germany:Berlin Spain:Madrid Italy:Rome Portugal:Lisbon
Austria:Vienna Ireland:Dublin Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw
Greece:Athens Egypt:Cairo Japan:Tokyo China:Beijing India:Delhi Canada:Ottawa Australia:Canberra Peru:Lima
Colombia:Bogota Kenya:Nairobi Turkey:Ankara Belgium:Brussels Netherlands:Amsterdam Hungary:Budapest
Russia:Moscow Cuba:Havana Chile:Santiago England:London""".split())

OPPOSITES = dict(pair.split(":") for pair in """hot:cold big:small tall:short fast:slow old:young happy:sad light:dark
open:closed up:down left:right early:late rich:poor strong:weak wet:dry high:low long:short full:empty hard:soft
near:far day:night good:bad clean:dirty loud:quiet thick:thin true:false first:last win:lose buy:sell""".split())

SOUNDS = dict(pair.split(":") for pair in """cat:meow dog:woof cow:moo duck:quack sheep:baa lion:roar wolf:howl
frog:croak owl:hoot horse:neigh pig:oink mouse:squeak crow:caw""".split())

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November December""".split()

WORDS = sorted(set(ANIMALS + FRUITS + OBJECTS + COLORS + PLACES))

JOBS = """teacher doctor farmer baker sailor painter writer nurse pilot gardener singer carpenter engineer
shoemaker fisherman librarian""".split()
HOBBIES = """reading painting swimming cooking hiking singing dancing fishing gardening chess cycling running
photography knitting""".split()

# One verb object pair names a made-up tool; the arguments come with the value kind that fills them.
TOOL_VERBS = """get find search create delete update send read list check compute convert book cancel start stop
lookup fetch count play open close move rename""".split()
TOOL_NOUNS = """weather time order ticket invoice email message note task event file record price stock recipe song
flight hotel room contact address route user account report photo door light alarm reminder""".split()
TOOL_PARAMS = {
    "city": "city",
    "location": "city",
    "place": "city",
    "destination": "city",
    "name": "name",
    "user": "name",
    "person": "name",
    "recipient": "name",
    "color": "color",
    "item": "object",
    "product": "object",
    "object": "object",
    "animal": "animal",
    "fruit": "fruit",
    "day": "day",
    "weekday": "day",
    "month": "month",
    "count": "number",
    "quantity": "number",
    "amount": "number",
    "number": "number",
    "id": "number",
    "limit": "number",
    "query": "phrase",
    "topic": "phrase",
    "title": "phrase",
    "text": "phrase",
    "room": "place",
}

DEFLECT = """Explain quantum mechanics|Write a program that sorts a list|Translate this letter into Chinese|
What is the meaning of life|Who won the world cup|What will the stock market do tomorrow|Solve this integral|
Summarize the news of today|What is the population of Brazil|How do I fix my car|Write an essay about economics|
How does a nuclear reactor work|What is the best phone to buy|Who is the president|Prove the Riemann hypothesis|
Explain how transformers work|How do I cook risotto|Plan a trip to Iceland|What is the speed of light|
Give me legal advice|Diagnose my headache|Write a Python script|Explain photosynthesis|What causes inflation|
Tell me about the Roman Empire|How tall is Mount Everest|When did the war end|Compare two databases|
What is machine learning|Write a haiku about autumn in Japanese""".replace("\n", "").split("|")
