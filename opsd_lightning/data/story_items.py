"""Everyday situations of two sentences, each with an ending that follows from them."""

from __future__ import annotations

from typing import NamedTuple


class Situation(NamedTuple):
    """A situation.

    Args:
        kind: The first of its topics.
        topics: Names of its topics. Endings of situations that share a topic are not options of one question.
        beginning: Two sentences, with ``{x}`` for a word that varies and placeholders for the person (`Person`).
        ending: The sentence that follows, with the placeholders of the person.
        words: The words for ``{x}``.
    """

    kind: str
    topics: frozenset[str]
    beginning: str
    ending: str
    words: tuple[str, ...]

    def alike(self, other: Situation) -> bool:
        """Return True if both endings are about what the person does next, or neither is."""
        return self.ending.startswith("{S}") == other.ending.startswith("{S}")


class Person(NamedTuple):
    """A person with the pronouns of a sentence's start and middle.

    Args:
        N: Name.
        S: Subject pronoun at the start of a sentence.
        s: Subject pronoun.
        P: Possessive pronoun at the start of a sentence.
        p: Possessive pronoun.
        o: Object pronoun.
    """

    N: str
    S: str
    s: str
    P: str
    p: str
    o: str


PEOPLE = (
    *(
        Person(name, "She", "she", "Her", "her", "her")
        for name in ["Anna", "Clara", "Emma", "Grace", "Julia", "Laura", "Maria", "Sophie"]
    ),
    *(
        Person(name, "He", "he", "His", "his", "him")
        for name in ["Adam", "Daniel", "Frank", "George", "Henry", "Jack", "Paul", "Peter"]
    ),
)

# Topics | beginning | ending | words for {x}. A line is one situation.
_LINES = """
rain water | {N} walked home through heavy rain without an umbrella. {P} {x} were soaked. | {S} changed into something dry and warm. | clothes, trousers, shoes and socks
snow | The {x} was covered with deep snow in the morning. {N} could not open the gate. | {S} took a shovel and dug a way through the snow. | path, driveway, yard
sun | The sun burned on the {x} all day. {N} had forgotten to use sunscreen. | In the evening {p} skin was red and sore. | beach, boat, field
wind | A strong wind blew across the {x}. It tore the hat off {N}'s head. | {S} ran after the hat to catch it. | bridge, square, hill
rain storm | Dark clouds gathered over the {x}. {N} heard thunder in the distance. | {S} hurried indoors before the storm began. | lake, valley, hills
ice snow | The {x} had been frozen for weeks. {N} tied on {p} skates. | {S} glided slowly across the ice. | pond, lake, canal
sun heat sleep | It was the hottest day of the {x}. {N} could not stop sweating. | {S} turned on the fan to cool the room. | year, summer, month
fog drive | Thick fog covered the {x}. {N} could hardly see the car ahead. | {S} drove slowly with the lights on. | road, bridge, highway
snow | The snow was perfect for playing. {N} rolled three big balls in the {x}. | {S} stacked them up to make a snowman. | garden, park, schoolyard
kitchen fire | {N} left the {x} in the oven too long. Black smoke filled the kitchen. | {S} opened the windows to let the smoke out. | cake, bread, pizza
kitchen wound | {N} was cutting {x} with a sharp knife. The knife slipped and cut {p} finger. | {S} put a bandage on the cut. | onions, carrots, bread
kitchen shop | {N} wanted to make {x}. There were no eggs left in the fridge. | {S} went out to buy a dozen eggs. | pancakes, an omelet, a cake
kitchen | {N} tasted the {x}. It was far too bland. | {S} added a pinch of salt and stirred. | soup, stew, sauce
kitchen smell | {N} found some old {x} in the fridge. It smelled terrible. | {S} held {p} nose and threw it away. | cheese, fish, meat
kitchen | After dinner the sink was full of dirty {x}. {N} rolled up {p} sleeves. | {S} washed them and set them out to dry. | plates, dishes, pots
kitchen | {N} put a tea bag into the {x}. The water in the kettle began to boil. | {S} poured the hot water over the tea. | cup, mug, teapot
kitchen | {N} dropped a {x} on the kitchen floor. It broke into many pieces. | {S} swept up the pieces with a broom. | glass, plate, bowl
kitchen | {N} squeezed a dozen {x}. The jug was full to the top. | {S} poured everyone a glass of fresh juice. | oranges, lemons, limes
kitchen | {N} mixed flour, butter and sugar in a {x}. The dough was ready. | {S} rolled it out and cut round cookies. | bowl, mixer, big pot
school exam | {N} studied for the {x} test every evening. On Friday the teacher handed back the papers. | {S} had the best grade in the class. | history, spelling, biology
school | {N} forgot to do {p} {x} homework. The teacher asked everyone to hand it in. | {S} had to admit that it was not done. | English, French, science
school | {N} wanted to ask a question about the {x}. The teacher was writing on the board. | {S} raised {p} hand and waited. | lesson, poem, map
school | {N} broke the tip of {p} pencil during the {x}. The paper was still half empty. | {S} took out a sharpener and used it. | exam, lesson, test
school | The bell rang at the end of the {x}. {N} closed {p} books. | {S} packed {p} bag and left the classroom. | lesson, day, class
school sleep travel late | {N} overslept on the day of the {x}. The school bus left without {o}. | {P} father drove {o} to school instead. | exam, trip, concert
school eyes | {N} could not read the words on the {x}. They looked blurry from the back row. | {S} moved to a seat in the front. | board, screen, poster
school shop | {N} had borrowed three {x} from the library. They were due back today. | {S} returned them to the librarian. | novels, comics, cookbooks
school stage | {N} had made a poster about {x} for school. The teacher called {o} to the front. | {S} showed the class the pictures and explained them. | whales, volcanoes, castles
ill | {N} woke up with a {x}. A thermometer showed a high fever. | {S} stayed in bed and called the doctor. | sore throat, headache, cough
ill wound | {N} fell off a {x} and hurt {p} arm. It was swollen and would not move. | An X-ray showed that the bone was broken. | ladder, horse, bike
ill food | {N} ate too much {x}. {P} stomach began to hurt. | {S} lay down and felt sick for hours. | candy, cake, ice cream
ill | {N} had a toothache after eating {x}. The pain got worse every hour. | {S} made an appointment with the dentist. | sweets, toffee, nuts
ill wound | {N} scraped {p} knee on the {x}. It was bleeding a little. | {P} mother cleaned the wound and bandaged it. | pavement, stairs, rocks
ill dust | Dust from the {x} got into {N}'s nose. It tickled more and more. | {S} sneezed loudly three times. | attic, carpet, old books
ill shop | {N} showed the doctor {p} {x}. The doctor wrote a prescription. | {S} got the medicine from the pharmacy. | rash, swollen toe, red eye
ill insect | A {x} stung {N} on the arm. The skin turned red and hurt. | {S} put ice on the sting to cool it. | bee, wasp, hornet
dog | {N}'s {x} scratched at the door and whined. {S} picked up the leash. | They went for a long walk in the park. | dog, puppy, terrier
cat | The cat sat in front of its empty {x}. It meowed at {N}. | {S} opened a can of cat food. | bowl, dish, plate
cat ladder | {N}'s kitten climbed up a tall {x}. It was too afraid to come down. | {S} got a ladder to rescue it. | tree, pole, wall
dog dirt | {N}'s dog rolled in the {x}. It was dirty from head to tail. | {S} gave it a bath with warm water and soap. | mud, swamp, wet sand
pet lost | {N} cleaned the {x} and forgot to close the little door. The hamster was gone. | {S} searched under every piece of furniture. | cage, hutch, glass box
pet clean | The fish tank was green with {x}. {N} could hardly see the fish. | {S} changed the water and scrubbed the glass. | algae, slime, dirt
pet dog cat ill | {N}'s {x} had not eaten for three days. It lay in the corner and did not move. | {S} took it to the vet at once. | rabbit, dog, cat
dog sport | {N} threw a {x} across the meadow. The dog ran after it. | It brought it back, wagging its tail. | stick, ball, frisbee
pet | {N} held out {x} to the horse. The horse stretched its neck. | It ate gently from {p} open palm. | an apple, a carrot, a lump of sugar
pet bird | {N} heard chirping from a {x}. Three tiny beaks were wide open. | The mother bird fed them worms. | nest, tree, bush
drive | {N} was driving to {x} when a tire burst. The car came to a stop. | {S} got out and put on the spare wheel. | work, the airport, the coast
drive | The tank of {N}'s car was almost empty. There was a gas station next to the {x}. | {S} stopped there and filled the tank. | road, motel, bridge
travel | {N} arrived at the {x} five minutes late. The train had already left. | {S} sat down and waited for the next one. | station, platform, terminal
travel clothes | {N} packed {p} suitcase for a trip to {x}. It was too full to close. | {S} took out two sweaters and tried again. | Spain, Greece, Italy
drive | The traffic light at the {x} turned red. {N} was driving toward it. | {S} put {p} foot on the brake. | crossing, corner, bridge
travel | {N} was lost in {x}. None of the streets looked familiar. | {S} took out a map to find the way. | Paris, the old town, a strange city
travel drive | {N} boarded the plane to {x}. A voice asked everybody to be seated. | {S} sat down and fastened {p} seat belt. | London, Berlin, Madrid
travel | The conductor came through the {x}. {N} was sitting by the window. | {S} showed him {p} ticket. | train, tram, last carriage
travel | {N} reached the hotel in {x} late at night. A clerk was sitting at the desk. | He gave {o} the key to a room. | Rome, Vienna, Boston
travel ill | The ferry rocked in the {x} waves. {N} turned pale. | {S} leaned over the rail and felt seasick. | high, wild, huge
shop clothes | {N} wanted to buy a {x}. The one in the window was too small. | {S} asked the clerk for a larger size. | coat, jacket, sweater
shop | {N} filled the cart with {x}. {S} had found everything on the list. | {S} pushed it to the checkout to pay. | groceries, vegetables, food
shop | {N}'s new {x} stopped working after one day. {S} still had the receipt. | {S} took it back and got a refund. | radio, toaster, lamp
shop clothes | {N} tried on a red {x} and a blue one. The blue one did not fit. | {S} decided to take the red one. | hat, jacket, shirt
shop lost money | {N} stood at the checkout with a full {x}. {P} wallet was not in {p} pocket. | {S} left the goods and went home to get it. | basket, cart, bag
shop | The market was about to close. {N} still had many ripe {x} to sell. | {S} lowered the price to get rid of them. | tomatoes, plums, peaches
shop clothes rain | {N}'s old {x} had holes in the soles. Water came in at every step. | {S} bought a new pair of shoes. | shoes, boots, sneakers
shop travel | There was a long line at the {x}. {N} only wanted one loaf of bread. | {S} stood at the end and waited {p} turn. | bakery, counter, supermarket
shop mail | {N} ordered a {x} on the internet. Two days later the doorbell rang. | A man handed {o} a parcel. | book, lamp, watch
garden | {N} looked at the {x} in the dry garden. It had not rained for weeks. | {S} filled a can and watered them. | roses, tulips, bean plants
garden | The grass in front of {N}'s {x} was knee-high. The neighbors complained. | {S} got out the mower and cut it. | house, cottage, cabin
garden | Weeds were growing between the {x}. {N} put on {p} gloves. | {S} pulled them out one by one. | carrots, beans, roses
garden | {N} planted {x} seeds in spring. {S} watered them every day. | Soon small green shoots came out of the earth. | sunflower, pumpkin, bean
garden ladder | The {x} on the tree were ripe. {N} brought a ladder and a basket. | {S} climbed up and picked them. | apples, pears, cherries
garden | In autumn the {x} was covered with dry leaves. {N} fetched a rake. | {S} gathered the leaves into a big pile. | lawn, path, yard
garden | Rabbits had eaten {N}'s {x} again. Half the bed was bare. | {S} built a fence around the bed. | lettuce, cabbage, parsley
garden storm | A dead branch of the {x} hung over {N}'s roof. It could fall at any time. | {S} sawed it off with care. | oak, pine, elm
garden | {N} dug a hole for the young {x}. {S} set the roots in it. | {S} filled the hole with earth. | tree, bush, vine
sport win | {N} had trained for the {x} for months. On the day of the race nobody could keep up. | {S} crossed the finish line first. | marathon, run, cycle race
sport | In the {x} the score was even. {N} had the ball before the goal. | {S} kicked it past the keeper. | final, last game, last minute
sport snow | {N} stood at the top of the {x} on skis. {S} pushed off with {p} poles. | {S} raced down through the snow. | slope, hill, mountain
sport | {N} lost the {x} match by a single point. {P} opponent came to the net. | They shook hands after the game. | tennis, badminton, table tennis
sport water | {N} climbed up to the diving board at the {x}. {S} looked down at the water. | {S} held {p} breath and jumped in. | pool, lake, swimming hall
fishing water | {N} put a worm on the hook and sat by the {x}. After an hour the line jerked. | {S} reeled in a big fish. | lake, river, pond
sport ill sleep | {N} ran ten miles through the {x}. {P} legs ached. | {S} sat down on a bench to rest. | park, woods, hills
sport | {N} pushed another player in the {x}. The referee blew his whistle. | He showed {o} a red card. | first half, last minute, penalty area
sport | {N} threw the {x} toward the hoop. It bounced twice on the rim. | Then it dropped through the net. | ball, basketball, heavy ball
sport water rain | {N} paddled the {x} down the wild river. It hit a rock and tipped over. | {S} swam to the bank in wet clothes. | canoe, kayak, raft
repair water | Water dripped from the {x} all night. {N} could not stop it. | {S} called a plumber to fix the leak. | faucet, tap, pipe
repair | The light bulb in the {x} burned out. {N} sat in the dark. | {S} screwed in a new bulb. | hall, cellar, bedroom
repair | The door of the {x} squeaked loudly. {N} found a can of oil. | {S} put a few drops on the hinges. | kitchen, barn, cupboard
repair | {N} wanted to hang a {x} on the wall. {S} held a nail in {p} hand. | {S} drove it in with a hammer. | picture, mirror, calendar
repair paint | The paint on the {x} was peeling. {N} bought a brush and a can. | {S} gave it a fresh coat of paint. | fence, door, shed
repair | A leg of the {x} was loose. {N} brought {p} toolbox. | {S} tightened the screws until it stood firmly. | chair, table, stool
lost home | {N} came home and could not find {p} {x}. The door was locked. | {S} asked the neighbor for the spare one. | key, house key, door key
home fire heat | The house was cold because the {x} had stopped working. {N} shivered in the living room. | {S} lit a fire in the fireplace. | heater, furnace, boiler
home dust | The {x} was covered with dust and crumbs. {N} plugged in the vacuum cleaner. | {S} pushed it back and forth until all was clean. | carpet, rug, floor
home clothes | {N}'s basket was full of dirty {x}. {S} carried it to the washing machine. | {S} put in detergent and started it. | clothes, towels, shirts
home clothes fire | {N} was ironing a {x} when the phone rang. {S} left the hot iron lying on it. | When {s} came back there was a burnt hole. | shirt, skirt, scarf
sleep | {N} had worked late and was very tired. {S} lay down on the {x}. | {S} closed {p} eyes and fell asleep. | sofa, bed, couch
sleep | The alarm clock rang at {x}. {N} did not want to get up. | {S} pressed the button and turned over. | six, dawn, five thirty
sleep | {N} saw {x} coming closer and screamed. Then {s} opened {p} eyes in {p} bed. | {S} was glad that it was only a dream. | a monster, a ghost, a huge wolf
sleep party | The neighbors had a loud {x} at midnight. {N} could not sleep. | {S} knocked and asked them to be quiet. | party, quarrel, celebration
sleep child | It was bedtime for {N}'s little {x}. A book of fairy tales lay on the pillow. | {S} read aloud until the child fell asleep. | sister, brother, cousin
sleep insect ill | A mosquito buzzed around {N}'s {x} all night. It bit {o} twice. | {S} woke up with itchy red spots. | head, bed, pillow
party | Everyone hid behind the {x} and the lights were off. {N} opened the door. | They jumped up and shouted happy birthday. | sofa, curtains, table
party mail | {N} unwrapped the present from {p} {x}. It was the toy {s} had wanted for a year. | {S} smiled and said thank you. | aunt, uncle, grandmother
party | There were eight candles on {N}'s {x} cake. Everybody sang. | {S} made a wish and blew them out. | chocolate, birthday, lemon
party | {N} was getting the room ready for the {x}. The balloons were still flat. | {S} blew them up and tied them with string. | party, birthday, celebration
party music | A slow waltz was played at the {x}. {N} held out a hand to {p} friend. | They danced together until midnight. | wedding, ball, party
party stage | A man in a {x} pulled a rabbit out of a hat. {N} sat in the first row. | {S} wondered how the trick worked. | black cape, red suit, dark coat
party | The doorbell rang during the {x}. {N} saw two guests with flowers outside. | {S} asked them to come in and took their coats. | party, dinner, celebration
party stage | {N} told a joke about a {x} at dinner. It was very funny. | Everyone at the table burst out laughing. | parrot, fisherman, lazy cook
child game | The children played hide and seek at the {x}. It was {N}'s turn to seek. | {S} counted to twenty and looked behind the trees. | park, forest, picnic
music stage | {N} played the last note on the {x}. The concert hall was silent for a moment. | Then the audience stood up and applauded. | piano, violin, cello
music | A string of {N}'s {x} snapped in the middle of a song. It hung loose. | {S} stretched a new string and tuned it. | guitar, violin, banjo
paint | {N} set up {p} easel in front of the {x}. {S} took out brushes and colors. | {S} painted the view on the canvas. | lake, castle, old mill
music ill | {N} had sung in the {x} all day. {P} voice was hoarse. | After that {s} could only whisper. | choir, opera, rehearsal
craft | {N} shaped a {x} out of wet clay. It had to become hard. | {S} fired it in a hot kiln. | vase, bowl, cup
music | The radio played {N}'s favorite {x}. {S} knew every word. | {S} turned it up and sang along. | song, tune, ballad
craft clothes shop | {N} was knitting a long {x}. The wool ran out before it was done. | {S} bought another ball of the same color. | scarf, sweater, blanket
film | The film about the {x} was very sad. {N} reached for a tissue. | {S} wiped the tears from {p} eyes. | war, lost dog, orphan
stage | {N} forgot {p} lines in the middle of the {x}. {S} stood frozen on the stage. | A friend whispered the next words to {o}. | play, comedy, second act
phone | {N}'s {x} had only one percent of battery left. {S} was still watching a show on it. | {S} plugged in the charger. | phone, tablet, laptop
computer | {N} typed {p} password for the {x} three times. It was wrong each time. | {S} clicked on the link to reset it. | bank, website, computer
computer | {N} was writing a long {x} on the computer. Suddenly the power went out. | All the unsaved work was lost. | letter, report, essay
phone film | {N}'s phone rang loudly in the {x}. Everybody turned around to look. | {S} blushed and switched it off. | library, cinema, meeting
phone | {N} took a photo of the {x}. It was blurred because {p} hand shook. | {S} deleted it and took another one. | tower, sunset, parade
phone water | {N} dropped {p} phone into the {x}. It sank to the bottom. | {S} fished it out and dried it with a cloth. | bath, sink, fountain
computer | {N} wanted to print {x}. A light showed that there was no paper. | {S} put a new stack in the tray. | a letter, a poster, the report
phone mail | {N} got a text message from {p} {x}. It asked when {s} would arrive. | {S} typed a reply and sent it. | mother, sister, boss
computer film | The video on {N}'s {x} kept stopping. The connection was very slow. | {S} restarted the router. | tablet, laptop, television
work late | {N} was late for work three times this {x}. The boss called {o} in. | He warned {o} to be on time. | week, month, year
work mail | {N} applied for a job as a {x}. A letter arrived with good news. | {S} started work the following Monday. | cook, driver, gardener
police money | {N} found a {x} full of money on the street. There was a name inside. | {S} took it to its owner. | wallet, purse, bag
money | {N} put coins into {p} piggy bank to buy a {x}. After a year it was full. | {S} broke it open and counted the money. | bike, guitar, telescope
police drive | Somebody had broken the window of {N}'s {x}. The radio was gone. | {S} reported the theft to the police. | car, van, truck
mail | {N} put the letter to {p} {x} into an envelope. It was ready to be sent. | {S} stuck on a stamp and mailed it. | cousin, bank, pen friend
food money | The waiter in the {x} brought the bill. {N} had enjoyed the meal. | {S} paid and left a tip. | restaurant, pizzeria, hotel
food work kitchen | A customer found a hair in the {x}. {N} was serving at the tables that day. | {S} apologized and brought a fresh plate. | soup, salad, pasta
fire | Flames came out of the windows of the {x}. {N} called for help. | Soon the firefighters arrived with their hoses. | barn, school, warehouse
child | The baby in the {x} began to cry. {N} saw that the diaper was wet. | {S} changed it, and the crying stopped. | crib, stroller, next room
child lost | A small child was crying alone in the {x}. {N} bent down and took its hand. | {S} helped the child to find its mother. | store, crowd, station
"""  # noqa: E501


def situations() -> list[Situation]:
    """Return all situations."""
    found = []
    for line in _LINES.strip().splitlines():
        topics, beginning, ending, words = (part.strip() for part in line.split(" | "))
        found.append(Situation(topics.split()[0], frozenset(topics.split()), beginning, ending, tuple(words.split(", "))))
    return found
