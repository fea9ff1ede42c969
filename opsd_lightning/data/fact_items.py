"""Facts that everybody knows, for multiple-choice questions: keys with their right answers, by kind."""

from __future__ import annotations

from typing import NamedTuple


class FactKind(NamedTuple):
    """Facts of one kind. Right answers to other questions of the kind are wrong options.

    Args:
        question: The question, with ``{}`` for the key.
        facts: Keys with right answers, as ``key: answer``, separated by semicolons.
        clashes: Groups of answers that are not options of one question, since more than one could be right. Answers are
            separated by commas, groups by semicolons.
    """

    question: str
    facts: str
    clashes: str = ""

    def pairs(self) -> list[tuple[str, str]]:
        """Return keys with their answers."""
        return [(key, answer) for key, answer in (fact.split(": ") for fact in _parts(self.facts, ";"))]

    def wrong_answers(self, right: str) -> list[str]:
        """Return the answers that can stand beside a right one, each once."""
        groups = [_parts(group, ",") for group in _parts(self.clashes, ";")]
        close = {right}.union(*(group for group in groups if right in group))
        return [answer for answer in dict.fromkeys(answer for _, answer in self.pairs()) if answer not in close]


def _parts(text: str, mark: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(mark) if part.strip()]


KINDS: dict[str, FactKind] = {
    "capital": FactKind(
        "What is the capital of {}?",
        """France: Paris; Italy: Rome; Spain: Madrid; Germany: Berlin; England: London; Japan: Tokyo; China: Beijing;
        Russia: Moscow; Egypt: Cairo; Greece: Athens; Portugal: Lisbon; Austria: Vienna; Poland: Warsaw; Sweden:
        Stockholm; Norway: Oslo; Denmark: Copenhagen; Finland: Helsinki; Ireland: Dublin; Belgium: Brussels; Hungary:
        Budapest; Turkey: Ankara; Cuba: Havana; Peru: Lima; Chile: Santiago; Canada: Ottawa; Thailand: Bangkok; Vietnam:
        Hanoi; South Korea: Seoul; Kenya: Nairobi; Iran: Tehran; Iraq: Baghdad; Australia: Canberra; New Zealand:
        Wellington; Romania: Bucharest; Bulgaria: Sofia; Iceland: Reykjavik; Scotland: Edinburgh; Croatia: Zagreb;
        Serbia: Belgrade; Nepal: Kathmandu; the Philippines: Manila; Venezuela: Caracas; Colombia: Bogota; Morocco:
        Rabat; the Czech Republic: Prague""",
    ),
    "opposite": FactKind(
        'What is the opposite of "{}"?',
        """hot: cold; big: small; fast: slow; up: down; happy: sad; young: old; wet: dry; full: empty; heavy: light; dark:
        bright; rich: poor; strong: weak; left: right; early: late; near: far; high: low; hard: soft; loud: quiet; clean:
        dirty; inside: outside; first: last; begin: end; win: lose; buy: sell; push: pull; love: hate; give: take;
        remember: forget; true: false; thick: thin; wide: narrow; deep: shallow; sweet: sour; cheap: expensive; easy:
        difficult; safe: dangerous; always: never; above: below; front: back; north: south; east: west; friend: enemy;
        awake: asleep; alive: dead; tall: short; before: after; summer: winter; day: night; arrive: leave; smooth: rough;
        success: failure; laugh: cry; guilty: innocent; ancient: modern; question: answer; good: bad; best: worst""",
        """small, short, low, narrow, thin, shallow, light, soft, weak, poor; cold, winter, night; down, below, low; bad,
        worst, false, dirty, poor, dangerous, hate, sad; light, bright, modern; slow, late, last, after, end, never;
        dead, asleep, never; weak, soft, quiet; sad, cry; leave, sell, take, lose, failure, end; back, after, last, end;
        rough, difficult, hate, expensive; outside, far, below; pull, take, hate; old, dead, late; small, old; empty, dry""",
    ),
    "past tense": FactKind(
        'What is the past tense of "{}"?',
        """run: ran; go: went; eat: ate; see: saw; take: took; give: gave; write: wrote; drink: drank; swim: swam; sing:
        sang; begin: began; fly: flew; know: knew; grow: grew; throw: threw; blow: blew; drive: drove; ride: rode; speak:
        spoke; break: broke; choose: chose; wake: woke; buy: bought; bring: brought; think: thought; teach: taught;
        catch: caught; fight: fought; sleep: slept; keep: kept; feel: felt; leave: left; lose: lost; sell: sold; tell:
        told; find: found; hold: held; stand: stood; sit: sat; win: won; make: made; say: said; come: came; fall: fell;
        forget: forgot; hide: hid; build: built; send: sent; meet: met; pay: paid""",
    ),
    "plural": FactKind(
        'What is the plural of "{}"?',
        """child: children; mouse: mice; foot: feet; tooth: teeth; goose: geese; man: men; woman: women; ox: oxen; leaf:
        leaves; knife: knives; wolf: wolves; wife: wives; life: lives; shelf: shelves; half: halves; thief: thieves;
        loaf: loaves; city: cities; baby: babies; berry: berries; box: boxes; bus: buses; dish: dishes; tomato: tomatoes;
        hero: heroes""",
    ),
    "young animal": FactKind(
        "What is a young {} called?",
        """dog: a puppy; cat: a kitten; cow: a calf; horse: a foal; sheep: a lamb; goat: a kid; bear: a cub; duck: a
        duckling; goose: a gosling; chicken: a chick; deer: a fawn; frog: a tadpole; pig: a piglet; kangaroo: a joey;
        swan: a cygnet; butterfly: a caterpillar""",
        "a duckling, a gosling, a chick, a cygnet; a calf, a fawn, a kid; a cub, a puppy",
    ),
    "job": FactKind(
        "Who {}?",
        """bakes bread: a baker; puts out fires: a firefighter; teaches children at school: a teacher; flies a plane: a
        pilot; cuts hair: a barber; treats sick animals: a vet; looks after your teeth: a dentist; grows crops: a farmer;
        paints pictures: an artist; catches fish for a living: a fisherman; cooks meals in a restaurant: a chef; delivers
        letters: a mailman; repairs cars: a mechanic; repairs leaking pipes: a plumber; makes suits: a tailor; sells
        meat: a butcher; travels into space: an astronaut; plays a part in a film: an actor; designs buildings: an
        architect; leads an orchestra: a conductor; arrests criminals: a police officer; makes furniture out of wood: a
        carpenter; digs coal out of the ground: a miner; studies the stars: an astronomer; sells flowers: a florist;
        brings the food to your table in a restaurant: a waiter; wears a crown: a king; works on a ship: a sailor;
        repairs the wires in a house: an electrician; cares for patients in a hospital: a nurse; makes people laugh at
        the circus: a clown; defends you in court: a lawyer; trains a football team: a coach; fights in an army: a
        soldier""",
        """a baker, a chef, a waiter, a butcher; a nurse, a vet, a dentist; a lawyer, a police officer, a soldier, a king; a
        carpenter, a plumber, an electrician, a mechanic, an architect; an artist, an actor, a conductor, a clown, a
        tailor; a sailor, a fisherman, a soldier, a pilot; a teacher, a coach, a nurse; an astronaut, a pilot, an
        astronomer; a farmer, a florist; a barber, a nurse; a firefighter, a police officer, a soldier""",
    ),
    "tool": FactKind(
        "What do you use to {}?",
        """cut paper: scissors; open a lock: a key; hit a nail: a hammer; tell the time: a clock; sweep the floor: a broom;
        eat soup: a spoon; write on a blackboard: chalk; dry yourself after a bath: a towel; stay dry when you walk in
        the rain: an umbrella; see faraway stars: a telescope; see tiny germs: a microscope; measure the temperature: a
        thermometer; take pictures: a camera; dig a hole: a shovel; cut down a tree: an axe; climb onto a roof: a ladder;
        sew on a button: a needle; light a candle: a match; boil water for tea: a kettle; keep food cold: a fridge; bake
        a cake: an oven; draw a straight line: a ruler; remove pencil marks: an eraser; find north: a compass; weigh
        yourself: a scale; wash your hands: soap; carry books to school: a backpack; see in the dark: a flashlight; look
        at your own face: a mirror; listen to a heart: a stethoscope; cross a river on foot: a bridge; look up the
        meaning of a word: a dictionary; see which day of the month it is: a calendar""",
        """a camera, a mirror, a telescope, a microscope, a flashlight; a clock, a calendar, a compass, a dictionary; an
        oven, a kettle, a match, a flashlight; a shovel, an axe, a hammer, a broom, scissors, a spoon; a towel, an
        umbrella, soap; a needle, scissors; a ladder, a bridge; a ruler, a scale, a thermometer, chalk, an eraser; a
        stethoscope, a thermometer; a backpack, a fridge; a key, a hammer, an axe, a needle; chalk, a match""",
    ),
    "place": FactKind(
        "Where do you {}?",
        """borrow books: at a library; buy medicine: at a pharmacy; look at lions and elephants: at a zoo; send a parcel: at
        a post office; watch a film: at a cinema; catch a plane: at an airport; keep your savings: at a bank; look at old
        paintings: at a museum; sleep on a trip: at a hotel; learn to read and write: at a school; go for an operation:
        at a hospital; buy fresh bread: at a bakery; put fuel in a car: at a gas station; eat a meal that a waiter
        brings: at a restaurant; milk cows: at a farm; build sandcastles: at a beach; watch clowns and acrobats: at a
        circus; load a ship: at a harbor; lift weights: at a gym; bury the dead: at a cemetery; pray: at a church; buy
        vegetables: at a market""",
        """at a library, at a school, at a museum; at a pharmacy, at a hospital, at a market, at a bakery, at a gas station;
        at a zoo, at a farm, at a circus; at a cinema, at a museum, at a circus; at an airport, at a harbor, at a post
        office; at a hotel, at a hospital, at an airport, at a beach; at a restaurant, at a hotel, at a market, at a
        bakery; at a beach, at a harbor; at a gym, at a school, at a hotel; at a church, at a cemetery, at a hospital, at
        a school; at a farm, at a market; at a zoo, at a museum; at a bank, at a post office""",
    ),
    "color": FactKind(
        "What color is {}?",
        """fresh grass: green; a clear sky at noon: blue; snow: white; coal: black; blood: red; a ripe banana: yellow; a
        carrot: orange; a lemon: yellow; an elephant: gray; milk: white; a ripe tomato: red; milk chocolate: brown; a
        flamingo: pink; a raven: black; an emerald: green; a ruby: red; a polar bear: white; a pumpkin: orange; spinach:
        green; table salt: white; the yolk of an egg: yellow; a daffodil: yellow; a ripe strawberry: red; broccoli:
        green; cotton wool: white; a violet flower: purple; a stop sign: red; a school bus in America: yellow""",
        "yellow, orange; red, orange, pink; purple, blue, pink; black, brown, gray; white, yellow, gray",
    ),
    "language": FactKind(
        "What is the main language of {}?",
        """Brazil: Portuguese; France: French; Germany: German; Mexico: Spanish; Japan: Japanese; Russia: Russian; Italy:
        Italian; Egypt: Arabic; Austria: German; Argentina: Spanish; Cuba: Spanish; Greece: Greek; Poland: Polish;
        Sweden: Swedish; Australia: English; Turkey: Turkish; the Netherlands: Dutch; Denmark: Danish; Hungary:
        Hungarian; Israel: Hebrew; Thailand: Thai; Vietnam: Vietnamese; Peru: Spanish; Chile: Spanish; Saudi Arabia:
        Arabic; Norway: Norwegian; England: English; South Korea: Korean""",
        "Arabic, Hebrew; Swedish, Norwegian, Danish",
    ),
    "continent": FactKind(
        "On which continent is {}?",
        """Kenya: Africa; Nigeria: Africa; Ghana: Africa; Morocco: Africa; Ethiopia: Africa; Tanzania: Africa; Uganda:
        Africa; Algeria: Africa; China: Asia; India: Asia; Japan: Asia; Thailand: Asia; Vietnam: Asia; Nepal: Asia;
        Mongolia: Asia; Pakistan: Asia; South Korea: Asia; France: Europe; Spain: Europe; Italy: Europe; Poland: Europe;
        Sweden: Europe; Norway: Europe; Greece: Europe; Austria: Europe; Belgium: Europe; Brazil: South America;
        Argentina: South America; Chile: South America; Peru: South America; Bolivia: South America; Ecuador: South
        America; Canada: North America; Mexico: North America; the United States: North America""",
    ),
    "category": FactKind(
        "What kind of thing is {}?",
        """a pear: a fruit; a strawberry: a fruit; a pineapple: a fruit; a banana: a fruit; a carrot: a vegetable; a
        cabbage: a vegetable; an onion: a vegetable; spinach: a vegetable; an eagle: a bird; a sparrow: a bird; an owl: a
        bird; a penguin: a bird; a shark: a fish; a trout: a fish; a tuna: a fish; a herring: a fish; a bee: an insect;
        an ant: an insect; a mosquito: an insect; a butterfly: an insect; an oak: a tree; a birch: a tree; a willow: a
        tree; a tulip: a flower; a daisy: a flower; a daffodil: a flower; a hammer: a tool; a saw: a tool; a wrench: a
        tool; a screwdriver: a tool; a car: a vehicle; a bus: a vehicle; a tractor: a vehicle; a truck: a vehicle; a
        piano: an instrument; a guitar: an instrument; a violin: an instrument; a trumpet: an instrument; soccer: a
        sport; tennis: a sport; basketball: a sport; hockey: a sport; a chair: furniture; a sofa: furniture; a wardrobe:
        furniture; a shirt: clothing; a jacket: clothing; a skirt: clothing; a sweater: clothing; lemonade: a drink;
        milk: a drink; beer: a drink; wine: a drink; aluminum: a metal; zinc: a metal; steel: a metal; Canada: a country;
        Japan: a country; Brazil: a country; Mars: a planet; Jupiter: a planet; Saturn: a planet; a square: a shape; a
        circle: a shape; a rectangle: a shape; April: a month; October: a month; July: a month; malaria: a disease;
        measles: a disease; Spanish: a language; German: a language""",
        """a fruit, a vegetable, a tree, a flower; a bird, a fish, an insect; a tool, an instrument, a vehicle, a sport,
        furniture; a metal, a tool; a country, a language""",
    ),
    "body": FactKind(
        "Which part of the body {}?",
        """do you see with: the eyes; do you hear with: the ears; do you smell with: the nose; do you taste with: the
        tongue; do you chew with: the teeth; do you think with: the brain; pumps blood: the heart; takes in air: the
        lungs; digests food: the stomach; is in the middle of the leg: the knee; is in the middle of the arm: the elbow;
        is between the head and the shoulders: the neck; do you wear a ring on: the finger; do you wear a watch on: the
        wrist; is between the leg and the foot: the ankle; do you stand on: the feet""",
        """the tongue, the teeth, the nose; the nose, the lungs; the finger, the wrist; the ankle, the feet, the knee; the
        eyes, the brain; the elbow, the wrist; the finger, the nose; the finger, the ears""",
    ),
    "animal": FactKind(
        "Which animal {}?",
        """barks: a dog; meows: a cat; gives us wool: a sheep; has a trunk: an elephant; has a very long neck: a giraffe;
        has black and white stripes: a zebra; spins a web: a spider; makes honey: a bee; carries its baby in a pouch: a
        kangaroo; is called the king of the beasts: a lion; builds dams: a beaver; quacks: a duck; croaks: a frog; is
        ridden by a jockey: a horse; moos: a cow; oinks: a pig; crows in the morning: a rooster; hoots at night: an owl;
        has eight arms and lives in the sea: an octopus; sleeps upside down in caves: a bat; has a hump: a camel; crawls
        without legs: a snake; is a bird that swims but cannot fly: a penguin; begins its life as a caterpillar: a
        butterfly; swings from tree to tree: a monkey; eats bamboo: a panda; is the largest in the sea: a whale; stores
        nuts for the winter: a squirrel; is the fastest runner on land: a cheetah; hides in its shell: a turtle""",
        """a frog, a duck; a giraffe, a camel, an elephant; a zebra, a panda, a penguin; an owl, a bat; an octopus, a whale,
        a spider; a monkey, a squirrel, a panda; a lion, a cheetah; a bee, a butterfly; a horse, a camel, an elephant; a
        sheep, a camel; a duck, a penguin, a rooster, an owl; a monkey, a kangaroo""",
    ),
}  # fmt: skip
