"""Which stickers a small model learns: 128 to start with, 256 that are common."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from apps.stickers.sprites import SpriteSheet

# Chosen by eye and by distance: none looks like another, nor, much, like any other sticker of the sheet.
_ANIMALS = """cat face, dog face, fox, lion, tiger face, bear, panda, koala, frog, monkey face, pig face, cow face,
mouse face, rabbit face, unicorn, zebra, giraffe, elephant, penguin, owl, duck, rooster, baby chick, parrot, flamingo,
swan, turtle, snake, crocodile, whale, dolphin, fish, tropical fish, shark, octopus, crab, lobster, snail, butterfly,
honeybee, lady beetle, spider, hedgehog, bat, camel"""
_FOOD = """red apple, banana, pineapple, strawberry, lemon, watermelon, grapes, cherries, pear, peach, carrot, broccoli,
avocado, eggplant, mushroom, ear of corn, bread, croissant, pretzel, cheese wedge, hamburger, pizza, hot dog, taco,
doughnut, cookie, birthday cake, ice cream, lollipop, popcorn, cooking, sushi, beer mug, french fries, cupcake"""
_VEHICLES = """automobile, taxi, bus, fire engine, tractor, bicycle, locomotive, airplane, helicopter, rocket,
sailboat"""
_FACES = """smiling face with sunglasses, clown face, ghost, alien, robot, skull, jack-o-lantern"""
_PLACES = """house, castle, tent, volcano, rainbow, crescent moon, star, cactus, sunflower, tulip, palm tree,
evergreen tree, four leaf clover"""
_THINGS = """red heart, crown, umbrella, guitar, soccer ball, basketball, balloon, wrapped gift, key, light bulb,
alarm clock, camera, television, bell, anchor, gem stone, trophy"""

_MORE_ANIMALS = """wolf, raccoon, horse face, gorilla, deer, rhinoceros, hippopotamus, hamster, kangaroo, sloth,
otter, skunk, peacock, dragon face, t-rex, sauropod, seal, blowfish, squid, shrimp, spiral shell, llama, turkey, eagle,
teddy bear"""
_MORE_FOOD = """green apple, tangerine, kiwi fruit, coconut, tomato, blueberries, hot pepper, cucumber, onion, garlic,
pancakes, waffle, bacon, sandwich, rice ball, spaghetti, chocolate bar, candy, honey pot, hot beverage, teapot,
cocktail glass, bubble tea, pie, fried shrimp"""
_MORE_VEHICLES = """ambulance, police car, delivery truck, racing car, motor scooter, motorcycle, skateboard, canoe,
speedboat, flying saucer, roller skate"""
_MORE_PLACES = """church, desert island, sun, ringed planet, cloud, fire, droplet, snowflake, snowman, high voltage,
rose, maple leaf, cherry blossom, hibiscus, christmas tree"""
_MORE_FACES = """smiling face with heart-eyes, cowboy hat face, partying face, nerd face, ogre, alien monster,
santa claus"""
_MORE_THINGS = """violin, trumpet, drum, saxophone, kite, puzzle piece, artist palette, crystal ball, dress, t-shirt,
sunglasses, top hat, high-heeled shoe, running shoe, backpack, gloves, scissors, hammer, axe, shield, magnet,
telescope, microscope, telephone, laptop, radio, candle, books, pencil, hourglass done, bomb, locked, money bag, chair,
megaphone, headphone, microphone, tennis, baseball, american football, boxing glove, game die, pool 8 ball, bullseye,
watch"""


def _names(*groups: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for group in groups for name in group.split(","))


STARTER = _names(_ANIMALS, _FOOD, _VEHICLES, _FACES, _PLACES, _THINGS)
COMMON = STARTER + _names(_MORE_ANIMALS, _MORE_FOOD, _MORE_VEHICLES, _MORE_PLACES, _MORE_FACES, _MORE_THINGS)


def check(sheet: SpriteSheet, vocabulary: Sequence[str], threshold: float = 0.1) -> list[tuple[str, str, float]]:
    """List what in a vocabulary is easily taken for something else.

    Args:
        sheet: all the stickers.
        vocabulary: the names to check.
        threshold: root mean square difference, of premultiplied RGBA in [0, 1] at 32x32, below which two look alike.

    Returns:
        (name, its nearest other sticker of the sheet, difference), nearest first.

    Raises:
        KeyError: a name isn't in the sheet.
    """
    pixels = functional.avg_pool2d(sheet.pixels.float() / 255, 4)  # (S, 4, 32, 32)
    flat = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], dim=1).flatten(1)  # (S, 4096)
    chosen = torch.tensor([sheet.index(name) for name in vocabulary])  # (V,)
    difference = torch.cdist(flat[chosen], flat) / flat.shape[1] ** 0.5  # (V, S)
    difference[torch.arange(len(chosen)), chosen] = torch.inf
    nearest, other = difference.min(dim=1)  # (V,)
    rows = zip(vocabulary, other.tolist(), nearest.tolist(), strict=True)
    return sorted(((n, sheet.names[o], d) for n, o, d in rows if d < threshold), key=lambda row: row[2])
