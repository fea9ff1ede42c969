"""Material for instructions about the form of an answer: sentences, questions, lists and objects."""

from __future__ import annotations

#: Sentences with the topic that an instruction names, behind a bar. The two words in stars are to be contained.
_SENTENCES = """
The *dog* sleeps under the *table*. | a dog
A *cat* is sitting on the *roof*. | a cat
The *horse* drinks from the *river*. | a horse
My *sister* planted a *tree*. | my sister
The old *clock* stopped at *noon*. | an old clock
Our *teacher* opened the *window*. | our teacher
The *train* crosses the long *bridge*. | a train
A small *boat* lies on the *beach*. | a small boat
The *moon* shines over the *forest*. | the moon
The *farmer* feeds his *chickens*. | a farmer
A *bird* sings in the *garden*. | a bird
The *baker* sells fresh *bread*. | a baker
Two *children* play in the *snow*. | two children
The *river* flows into the *sea*. | a river
My *brother* lost his *keys*. | my brother
The *doctor* works at the *hospital*. | a doctor
A *spider* sits in the *corner*. | a spider
The *wind* blows through the *valley*. | the wind
The *king* lives in a *castle*. | a king
A red *car* stands in the *street*. | a red car
The *student* reads a thick *book*. | a student
My *mother* makes hot *soup*. | my mother
The *sun* sets behind the *mountains*. | the sun
An *owl* hunts at *night*. | an owl
The *painter* cleans his *brush*. | a painter
The *bus* arrives in the *morning*. | a bus
A *frog* jumps into the *pond*. | a frog
The *girl* writes a long *letter*. | a girl
The *rain* falls on the *town*. | the rain
A *thief* stole the *money*. | a thief
The *pilot* waits at the *airport*. | a pilot
A *mouse* hides behind the *door*. | a mouse
The *band* plays a new *song*. | a band
My *friend* paints her *house*. | my friend
The *nurse* carries a *lamp*. | a nurse
The *fox* runs over the *field*. | a fox
"""

SENTENCES: list[tuple[str, str, list[str]]] = []
"""Sentences, with their topic and two of their words."""

for _line in _SENTENCES.strip().splitlines():
    _marked, _topic = _line.split(" | ")
    SENTENCES.append((_marked.replace("*", ""), _topic, _marked.split("*")[1::2]))

#: Sentences by their first word.
BEGINNINGS = {
    sentence.split(" ")[0].rstrip(","): sentence
    for sentence in """Yesterday we went to the lake.
Tomorrow the shop is closed.
Today the sky is blue.
Every child likes to play.
Sometimes the bus is late.
Suddenly the lights went out.
Finally the rain stopped.
Maybe she is at home.
Many birds fly south.
Most people like music.
When the bell rang, we left.
After dinner they took a walk.
Before the game he was nervous.
If it rains, we stay inside.
While she cooked, he set the table.
Once there was a king.
In winter the days are short.
Behind the house there is a garden.
Our neighbor has two cats.
Their car is very old.
Some flowers smell sweet.
Nobody heard the noise.
Everybody was happy.
Children learn quickly.
Usually I drink tea.
Never touch a hot stove.
Under the bed lay a shoe.
Without water plants die.
Three friends built a hut.
During the night it snowed.
Another guest arrived late.
Nothing was left on the plate.
Outside it was cold.
Often we eat fish.
Few animals live here.
Both doors were open.""".splitlines()
}

#: Questions by their topic.
QUESTIONS = {
    topic: question
    for topic, question in (
        line.split(": ")
        for line in """whales: Where do whales live?
the moon: How far away is the moon?
bread: How is bread made?
bees: How do bees make honey?
trains: When was the first train built?
winter: Why are the days short in winter?
gold: Where is gold found?
horses: How fast can a horse run?
tea: Which country drinks the most tea?
rain: Why does it rain?
castles: Who lived in castles?
the sea: How deep is the sea?
dogs: Why do dogs bark?
music: Who wrote this song?
trees: How old can a tree get?
sleep: Why do we sleep?
chess: Who invented chess?
volcanoes: What makes a volcano erupt?
spiders: How do spiders make their webs?
school: When does school begin?
football: How long is a football match?
ships: How are ships built?
birds: Why do birds sing?
cheese: How is cheese made?
the sun: How hot is the sun?
snakes: Are all snakes dangerous?
glass: How is glass made?
bridges: Which bridge is the longest?
cats: Why do cats purr?
salt: Where does salt come from?
dreams: Why do we dream?
clouds: What are clouds made of?
books: Who wrote this book?
paper: How is paper made?
elephants: What do elephants eat?
the wind: Where does the wind come from?""".splitlines()
    )
}

#: Items of lists by their name.
LISTS = {
    name: items.split(", ")
    for name, items in (
        line.split(": ")
        for line in """colors: red, blue, green, yellow
fruits: apple, banana, cherry, pear
animals: dog, cat, horse, cow
vegetables: carrot, onion, cabbage, potato
countries: France, Japan, Brazil, Kenya
cities: Paris, London, Rome, Tokyo
birds: owl, eagle, sparrow, robin
trees: oak, birch, pine, maple
flowers: rose, tulip, daisy, lily
sports: tennis, soccer, hockey, golf
drinks: water, milk, tea, coffee
tools: hammer, saw, drill, wrench
insects: bee, ant, fly, beetle
musical instruments: piano, violin, flute, drum
planets: Mars, Venus, Saturn, Jupiter
months: May, June, July, August
days of the week: Monday, Tuesday, Friday, Sunday
metals: iron, copper, gold, silver
clothes: shirt, coat, hat, skirt
jobs: baker, teacher, doctor, pilot
languages: French, Spanish, Greek, Dutch
school subjects: history, biology, music, art
pieces of furniture: chair, table, bed, sofa
parts of the body: head, arm, leg, foot
vehicles: car, bus, train, truck
rooms of a house: kitchen, bedroom, hall, cellar
fish: trout, tuna, shark, salmon
desserts: cake, pie, pudding, ice cream
toys: doll, ball, kite, puzzle
shapes: circle, square, triangle, oval
spices: salt, pepper, cinnamon, ginger
board games: chess, checkers, go, backgammon
farm animals: cow, pig, sheep, goat
kitchen utensils: spoon, fork, knife, pan
wild animals: lion, wolf, bear, fox
hobbies: reading, painting, fishing, dancing""".splitlines()
    )
}

#: Questions to answer with yes or no.
YES_OR_NO = {
    question: answer
    for question, answer in (
        line.split("? ")
        for line in """Is fire hot? Yes
Is ice warm? No
Can fish swim? Yes
Can cows fly? No
Is a banana a fruit? Yes
Is a carrot an animal? No
Does the sun give light? Yes
Is snow black? No
Do dogs bark? Yes
Do cats lay eggs? No
Is Paris a city? Yes
Is the moon made of cheese? No
Do birds have wings? Yes
Do snakes have legs? No
Is water wet? Yes
Is a stone alive? No
Do trees have leaves? Yes
Do cars eat grass? No
Is an elephant big? Yes
Is a mouse bigger than a horse? No
Is honey sweet? Yes
Is a lemon sweet? No
Is Italy in Europe? Yes
Is Japan in Africa? No
Do bees make honey? Yes
Do horses live in the sea? No
Is a piano an instrument? Yes
Is a hammer a drink? No
Does a bus have wheels? Yes
Does a chair have eyes? No
Is milk white? Yes
Is grass red? No
Do people need sleep? Yes
Can a book talk? No
Is a rose a flower? Yes
Is July a color? No""".splitlines()
    )
}

#: Things with keys of an object that describes each, and values.
OBJECTS = {
    name: dict(pair.split("=") for pair in pairs.split(", "))
    for name, pairs in (
        line.split(": ")
        for line in """a dog: name=Rex, color=brown
a cat: name=Luna, color=black
a book: title=The Sea, author=Jane Field
a car: brand=Ford, color=red
a city: city=Paris, country=France
a person: name=Anna, job=teacher
a student: name=Tom, school=Oak Hill
a film: title=The Storm, director=Paul Reed
a fruit: fruit=apple, color=green
a house: street=Main Street, color=white
a song: title=Blue Moon, singer=Ella
a tree: tree=oak, height=tall
a bird: bird=owl, food=mice
a horse: name=Star, color=white
a country: country=Italy, capital=Rome
a meal: dish=soup, drink=water
a shirt: color=blue, size=large
a teacher: name=Mr. Hill, subject=history
a train: from=London, to=Leeds
a letter: from=Mary, to=John
a flower: flower=rose, color=pink
a game: game=chess, players=two
a phone: brand=Nokia, color=gray
a job: job=baker, place=bakery
a river: river=Nile, country=Egypt
a planet: planet=Mars, color=red
a sport: sport=tennis, place=court
a team: team=Lions, city=Boston
a cake: flavor=lemon, size=small
a shop: shop=bakery, street=Mill Road
a boat: name=Wave, color=yellow
a toy: toy=kite, color=red
a farmer: name=Bill, animal=cow
a doctor: name=Dr. Lee, hospital=City Clinic
a painting: title=Sunrise, painter=Eva Stone
a concert: band=The Owls, city=Vienna""".splitlines()
    )
}

#: Names of Python functions, with parameters and a body.
FUNCTIONS = {
    name: (parameters, body)
    for name, parameters, body in (
        line.split(" | ")
        for line in """add_numbers | a, b | a + b
subtract | a, b | a - b
multiply | a, b | a * b
square | x | x * x
cube | x | x ** 3
double | x | 2 * x
half | x | x / 2
is_even | n | n % 2 == 0
is_odd | n | n % 2 == 1
is_positive | n | n > 0
absolute_value | x | abs(x)
maximum | a, b | max(a, b)
minimum | a, b | min(a, b)
average | values | sum(values) / len(values)
total | values | sum(values)
first_item | items | items[0]
last_item | items | items[-1]
count_items | items | len(items)
reverse_list | items | items[::-1]
sort_list | items | sorted(items)
reverse_string | text | text[::-1]
to_upper | text | text.upper()
to_lower | text | text.lower()
count_words | text | len(text.split())
count_letters | text | len(text)
first_letter | text | text[0]
join_words | words | " ".join(words)
say_hello | name | "Hello " + name
area_of_square | side | side * side
area_of_circle | radius | 3.14159 * radius ** 2
perimeter | width, height | 2 * (width + height)
fahrenheit | celsius | celsius * 9 / 5 + 32
is_empty | items | len(items) == 0
contains_item | items, item | item in items
remove_spaces | text | text.replace(" ", "")
negate | x | -x""".splitlines()
    )
}

#: First sentences of letters, by the person.
LETTERS = {
    sentence.split(",")[0].removeprefix("Dear "): sentence
    for sentence in """Dear Anna, how are you?
Dear Tom, thank you for the book.
Dear Mr. Hill, I am ill today.
Dear Mrs. Green, the garden is lovely.
Dear Grandma, I miss you.
Dear Uncle Bob, we arrived safely.
Dear Doctor Lee, my arm is better.
Dear Lucy, happy birthday.
Dear Peter, come to my party.
Dear Neighbor, your dog is here.
Dear Customer, your parcel is ready.
Dear Teacher, I forgot my homework.
Dear Parents, school ends early.
Dear Santa, I want a bike.
Dear Sarah, congratulations.
Dear Max, see you soon.
Dear Aunt Mary, the cake was great.
Dear Coach, I cannot play today.
Dear Friends, we are moving.
Dear Mayor, our park needs trees.
Dear Julia, I am in Rome.
Dear David, I found your keys.
Dear Ms. White, the room is cold.
Dear Oliver, let us meet.
Dear Mother, I am well.
Dear Father, the car is fixed.
Dear Brother, write soon.
Dear Sister, I like my new job.
Dear Captain, the ship is ready.
Dear Editor, I liked the story.
Dear Guests, dinner is at eight.
Dear Members, we meet on Monday.
Dear Emma, it is snowing here.
Dear Jack, the game was fun.
Dear Professor King, I have a question.
Dear Team, well done.""".splitlines()
}

#: Texts of headings.
HEADINGS = """Green Garden
Welcome Home
Our Team
Fresh Bread
City News
My Diary
Summer Camp
Blue Ocean
Good Morning
Happy Days
Contact Us
About Me
Daily Recipes
Old Castles
Wild Animals
Winter Sports
The Moon
World Map
Book Club
Music School
Flower Shop
Train Times
Weather Report
Family Photos
Lost and Found
Chess Club
Movie Night
Open House
Travel Tips
Farm Life
Art Gallery
Healthy Food
Pet Care
Bike Tours
Science Fair
Quiet Lake""".splitlines()
