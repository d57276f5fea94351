"""Word lists of our own: what the story seeds, the tool schemas and the filters draw from."""

from __future__ import annotations

ANIMALS = """fox bear rabbit owl mouse cat dog frog turtle squirrel hedgehog deer wolf lion tiger elephant monkey penguin
whale dolphin crab octopus snail bee butterfly ant spider duck goose hen pig cow sheep goat horse donkey camel kangaroo
koala panda parrot crow sparrow robin eagle swan otter beaver badger bat mole lizard snake crocodile hippo giraffe zebra
rhino seal shark goldfish kitten puppy lamb pony chick moth firefly ladybug raccoon skunk moose reindeer llama""".split()
COMMON = "fox rabbit bear owl mouse cat dog dragon robot turtle frog bird princess wizard pirate knight".split()
PEOPLE = """baker king queen prince princess knight wizard witch pirate sailor farmer teacher doctor gardener painter
fisherman shepherd tailor carpenter blacksmith girl boy grandmother grandfather giant fairy mermaid clown astronaut
detective librarian postman musician cook inventor explorer miner lighthouse-keeper clockmaker shoemaker beekeeper
drummer dancer singer juggler firefighter pilot captain traveler""".split()
THINGS = """robot dragon teapot train boat kite balloon clock lantern snowman tree cloud star moon river mountain cottage
castle bicycle umbrella violin drum piano pencil book map key mirror hat shoe scarf button candle bell spoon kettle
pumpkin apple acorn seed flower rose sunflower mushroom shell pebble raindrop snowflake tractor rocket toy doll puppet
teddy windmill bridge lighthouse submarine truck scarecrow statue broom blanket pillow cake cookie pie""".split()
NAMES = """Pip Rosie Max Luna Oliver Mia Leo Ruby Finn Clara Toby Ella Hugo Nora Sam Ivy Otto Daisy Milo Poppy Ben Lily
Oscar Hazel Theo Maya Jack Zoe Felix Anna Gus Molly Henry Tess Arlo Willow Bruno Penny Jasper Stella Rufus Nina Barney
Lola Charlie Olive Simon Greta Teddy Mabel Rory Elsie Kit Pearl Ned Wren Albert Sophie Dash Fern Bo Amy Tom Juno Ravi
Priya Omar Leila Kenji Yuki Mateo Sofia Amara Kofi Ingrid Lars Nadia Ivan Chloe""".split()
TRAITS = """little brave curious shy kind clever lonely gentle tiny old young cheerful sleepy hungry proud quiet small
playful careful happy grumpy patient lazy busy silly wise""".split()
PLACES = """at the edge of a quiet forest|in a small village by the sea|on a hill above the town|beside a slow green river
near a big lake|in a snowy valley|in an old wooden house|on a sunny farm|in a busy little town|under a tall oak tree
on a small island|in a garden full of flowers|at the foot of a high mountain|in a cozy cottage|near the harbor
at the end of a long road|in a warm desert|by a wide meadow|in a noisy city|behind the old mill""".replace(
    "\n", "|"
).split("|")
OBJECTS = """brass key|shiny blue stone|lost mitten|old map|broken music box|tiny golden bell|letter with no name on it
small wooden box|red balloon|silver whistle|torn kite|strange round egg|book of songs|glowing seed|muddy boot
glass bottle with a note inside|little lost bird|basket of apples|striped umbrella|cracked lantern|paper boat
wooden flute|purple feather|ticking pocket watch|jar of honey|painted shell|rusty bicycle|warm woolen scarf""".replace(
    "\n", "|"
).split("|")
WANTS = """wanted to learn how to swim|dreamed of seeing the sea|loved to sing but was afraid of singing for others
wanted to make a friend|loved to bake bread for everyone|wished to fly above the clouds|wanted to find a new home
liked to collect shiny things|was afraid of the dark|loved to tell jokes|wanted to win the village race
loved the stars more than anything|wanted to grow the biggest pumpkin in the valley|was looking for a lost friend
hated the rain|wanted to build a boat|loved to paint pictures of the sky|never liked to share|always got lost
was too shy to say hello|wanted to help everyone|loved to dance in the rain|had never seen snow
wanted to climb the tallest tree|was always in a hurry|loved to read by the fire|could not sleep at night""".replace(
    "\n", "|"
).split("|")
HELPERS = """a wise old owl|a friendly mouse|a tall gray heron|a kind old woman|a small boy with a red hat|a merry sailor
a tired donkey|a clever crow|a little girl named Emma|a gentle bear|a very old turtle|a traveling musician
a shy hedgehog|a cheerful baker|a grumpy goat|a tiny green frog|a quiet shepherd|a brown rabbit""".replace(
    "\n", "|"
).split("|")
TROUBLES = """the sky grew dark and it began to rain|a strong wind began to blow|the path was gone
the bridge was broken|a loud noise came from behind the trees|the snow began to fall|the lamp went out
it was gone|there was no one there|the water began to rise|the door would not open|the fog came down over the hills
everyone had gone home|the ice began to crack|the wheel broke|night came""".replace("\n", "|").split("|")
EVERYDAY = """make tea|boil an egg|cook rice|bake bread|clean a window|plant a seed|grow tomatoes|water a plant|tie a shoe
wrap a gift|write a letter|learn a new language|study for a test|fall asleep faster|wake up early|save money
stay healthy|make a new friend|say sorry|be a good listener|paint a room|fix a flat tire|wash a dog|care for a cat
build a snowman|fly a kite|pack a suitcase|plan a trip|make a sandwich|make soup|make pancakes|make a salad
clean a kitchen|read faster|remember names|speak in public|write a poem|draw a tree|take a good photo|train a puppy
start a garden|feed birds in winter|keep warm|stay calm|drink more water|exercise at home|ride a bicycle|swim
play chess|learn the guitar|sharpen a pencil|wash clothes|iron a shirt|set a table|light a campfire|find north
prepare for a storm|recycle paper|save energy at home|keep a diary|choose a book|give a compliment""".replace(
    "\n", "|"
).split("|")
TOPICS = """gravity|rain|rainbows|clouds|thunder|snow|the moon|the sun|stars|planets|tides|seasons|volcanoes|earthquakes
rivers|mountains|oceans|deserts|forests|trees|photosynthesis|seeds|flowers|bees|birds|fish|whales|dinosaurs|fossils
magnets|electricity|batteries|light|shadows|sound|heat|ice|water|air|oxygen|bones|muscles|the heart|lungs|the brain
blood|sleep|dreams|food|bread|sugar|salt|milk|vitamins|germs|medicine|money|trade|cities|maps|compasses|clocks|calendars
numbers|zero|fractions|computers|memory|software|the internet|robots|trains|airplanes|rockets|bicycles|bridges|boats
music|paint|paper|glass|metal|iron|gold|soap|wool|cotton|libraries|schools|laws|voting|friendship|kindness|courage
honesty|patience|history|language|poems|recycling|wind power|solar power|weather forecasts|a solid state drive
a neural network|a language model|machine learning|an algorithm|a database|encryption|a web browser""".replace(
    "\n", "|"
).split("|")
