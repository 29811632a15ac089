"""What each picture of the world shows: a class noun, its synonyms, and the picture's own name.

A prior is only worth preserving where a class has several members, so pictures of one class share one noun: the dog
face, the poodle and the guide dog are all "dog". `CLASSES` says so for every class with several members or with a
name that people would not use; every other picture is a class of its own under its cleaned Unicode name.
"""

import dataclasses

# noun | synonyms | short_name=own name, ... ; without "=" the own name is the noun itself. A member so named is
# captioned with the noun more often than its fellows are, and would be what "a dog" mostly means.
_CLASSES = """
dog | puppy | dog=dog face, dog2=standing dog, guide_dog=guide dog, service_dog=service dog, poodle=poodle
cat | kitten | cat=cat face, cat2=tabby cat, black_cat=black cat, smile_cat=grinning cat, scream_cat=scared cat, \
  heart_eyes_cat=cat with heart eyes
backpack | school bag | school_satchel
teapot | | teapot
robot | | robot_face=robot face
car | automobile | car, oncoming_automobile, taxi=taxi, oncoming_taxi=taxi, police_car=police car, \
  oncoming_police_car=police car, racing_car=racing car, blue_car=jeep
duck | | duck
teddy bear | stuffed animal, plush toy | teddy_bear
clock | | alarm_clock=alarm clock, timer_clock=timer clock, mantelpiece_clock=mantel clock, clock1=wall clock, \
  clock430=wall clock, clock8=wall clock, clock10=wall clock
bowl | | bowl_with_spoon=bowl with a spoon, rice=bowl of rice, ramen=bowl of noodles, green_salad=bowl of salad
can | tin can | canned_food
candle | | candle
sneaker | running shoe | athletic_shoe
boot | | boot, hiking_boot=hiking boot
glasses | | eyeglasses=eyeglasses, dark_sunglasses=sunglasses, goggles=goggles
vase | | amphora, funeral_urn=urn
toy | | yo-yo=yo-yo, nesting_dolls=nesting doll, pinata=pinata, gun=water pistol, kite=kite
cartoon | cartoon character | smiling_imp=cartoon devil, imp=cartoon devil, japanese_ogre=cartoon monster, \
  japanese_goblin=cartoon goblin, clown_face=cartoon clown
monkey | | monkey_face=monkey face, monkey, see_no_evil=see no evil monkey, hear_no_evil=hear no evil monkey
tiger | | tiger=tiger face, tiger2=standing tiger
horse | | horse=horse face, racehorse=standing horse
cow | | cow=cow face, cow2=standing cow
pig | | pig=pig face, pig2=standing pig
mouse | | mouse=mouse face, mouse2=standing mouse
rabbit | bunny | rabbit=rabbit face, rabbit2=standing rabbit
bear | | bear=bear face, polar_bear=polar bear
sheep | | sheep, ram=ram
camel | | camel, dromedary_camel
chick | | hatching_chick=hatching chick, baby_chick, hatched_chick
bird | | bird, black_bird=black bird
fish | | fish, tropical_fish=tropical fish
whale | | whale, whale2
dragon | | dragon_face=dragon face, dragon
dinosaur | | sauropod=sauropod, t-rex=t-rex
flower | | cherry_blossom=cherry blossom, rosette, blossom, hibiscus=hibiscus
rose | | rose, wilted_flower=wilted rose
tree | | evergreen_tree=pine tree, deciduous_tree, leafless_tree=bare tree
clover | | shamrock=shamrock, four_leaf_clover=four leaf clover
leaf | | maple_leaf=maple leaf, fallen_leaf=fallen leaf
nest | bird nest | empty_nest, nest_with_eggs=nest with eggs
apple | | apple=red apple, green_apple=green apple
bread | | bread, baguette_bread=baguette
cake | | birthday=birthday cake, cake=slice of cake
ice cream | | icecream=soft ice cream, ice_cream=ice cream sundae, shaved_ice=shaved ice
meat | | meat_on_bone, cut_of_meat=steak
pot | | stew=pot of stew, fondue=fondue pot
pan | frying pan | fried_egg=pan with an egg, shallow_pan_of_food=pan of food
cup | | coffee=cup of coffee, tea=cup of tea, cup_with_straw=cup with a straw
beer | | beer=beer mug, beers=two beer mugs
book | | closed_book=red book, green_book=green book, blue_book=blue book, orange_book=orange book, book=open book
notebook | | notebook, notebook_with_decorative_cover, ledger=yellow notebook
newspaper | | newspaper, rolled_up_newspaper=rolled up newspaper
envelope | letter | email, love_letter=love letter
mailbox | | mailbox, mailbox_with_mail=open mailbox
banknote | money | yen, dollar=dollar bill, euro=euro bill, pound
pen | | lower_left_ballpoint_pen, lower_left_fountain_pen=fountain pen
folder | | file_folder, open_file_folder=open folder
calendar | | date, calendar, spiral_calendar_pad=spiral calendar
pin | | pushpin=pushpin, round_pushpin
lock | padlock | lock, unlock=open lock
key | | key, old_key=old key
ruler | | straight_ruler, triangular_ruler=triangular ruler
camera | | camera, camera_with_flash=camera with flash
battery | | battery, low_battery
magnifying glass | | mag, mag_right
lantern | | izakaya_lantern=paper lantern
microphone | | microphone, studio_microphone=studio microphone
megaphone | | mega, loudspeaker
phone | | iphone=mobile phone
telephone | | phone, telephone_receiver=telephone receiver
disc | | cd, dvd
drum | | drum_with_drumsticks, long_drum=long drum
bag | | handbag=handbag, shopping_bags=shopping bags
shoe | | mans_shoe=brown shoe, womans_flat_shoe=flat shoe, high_heel=high heel
sandal | | thong_sandal=flip flop, sandal
shirt | t-shirt | shirt, womans_clothes=blouse
hat | | womans_hat=sun hat, tophat=top hat
helmet | | military_helmet, helmet_with_white_cross=rescue helmet
medal | | medal, sports_medal, first_place_medal=gold medal, second_place_medal=silver medal, \
  third_place_medal=bronze medal
ticket | | ticket, admission_tickets
heart | | heart=red heart, orange_heart=orange heart, yellow_heart=yellow heart, green_heart=green heart, \
  blue_heart=blue heart, purple_heart=purple heart, brown_heart=brown heart, black_heart=black heart, \
  broken_heart=broken heart
globe | planet earth | earth_africa, earth_americas, earth_asia
moon | | full_moon=full moon, crescent_moon=crescent moon, full_moon_with_face=moon with a face, \
  first_quarter_moon_with_face=moon with a face
sun | | sunny, sun_with_face=sun with a face
star | | star, star2=glowing star
cloud | | cloud, rain_cloud=rain cloud, snow_cloud=snow cloud, lightning=thunder cloud
umbrella | | umbrella, closed_umbrella=closed umbrella, umbrella_with_rain_drops=umbrella in the rain
beach umbrella | parasol | umbrella_on_ground
snowman | | snowman, snowman_without_snow
mountain | | mountain, snow_capped_mountain=snowy mountain, mount_fuji=mount fuji
house | | house, house_with_garden=house with a garden, derelict_house_building=old house
castle | | european_castle, japanese_castle=japanese castle
building | | office=office building, department_store=department store, hotel=hotel, hospital=hospital
tent | | tent, circus_tent=circus tent
train | | train2, steam_locomotive=steam train, bullettrain_front=high speed train, railway_car=railway car
tram | | tram, train, light_rail
bus | | bus, oncoming_bus, trolleybus=trolleybus, minibus=minibus
truck | | truck=delivery truck, articulated_lorry, pickup_truck=pickup truck
wheelchair | | manual_wheelchair, motorized_wheelchair=electric wheelchair
cable car | | mountain_cableway, aerial_tramway, suspension_railway
airplane | plane | airplane, small_airplane=small airplane
ship | | ship, passenger_ship=passenger ship, ferry=ferry
boat | | boat=sailboat, speedboat=speedboat, motor_boat=motor boat, canoe=canoe
traffic light | | traffic_light, vertical_traffic_light
hourglass | | hourglass, hourglass_flowing_sand
"""

# Single pictures whose Unicode name is not what a person would type.
_RENAMED = """
bee=bee, bug=caterpillar, ladybug=ladybug, hippopotamus=hippo, shell=seashell, blowfish=pufferfish, corn=corn,
eggplant=eggplant, hot_pepper=chili pepper, leafy_green=lettuce, kiwifruit=kiwi, cheese_wedge=cheese,
poultry_leg=chicken leg, pizza=pizza, curry=curry, sweet_potato=sweet potato, bento=lunch box, sake=sake bottle,
champagne=champagne bottle, clinking_glasses=champagne glasses, cocktail=cocktail, tumbler_glass=whisky glass,
mate_drink=mate cup, hocho=kitchen knife, knife_fork_plate=plate, peanuts=peanut, beverage_box=juice box,
oden=skewer, basketball=basketball, rugby_football=rugby ball, tennis=tennis racket, bowling=bowling ball,
cricket_bat_and_ball=cricket bat, field_hockey_stick_and_ball=field hockey stick, ice_hockey_stick_and_puck=hockey
stick, lacrosse=lacrosse stick, table_tennis_paddle_and_ball=table tennis paddle,
badminton_racquet_and_shuttlecock=badminton racket, golf=golf hole, fishing_pole_and_fish=fishing rod, ski=ski boot,
flying_disc=frisbee, dart=dartboard, 8ball=billiard ball, video_game=game controller, game_die=die, jigsaw=puzzle
piece, mirror_ball=disco ball, black_joker=playing card, mahjong=mahjong tile, performing_arts=theater masks,
art=paint palette, jack_o_lantern=halloween pumpkin, bamboo=bamboo, red_envelope=red envelope, ribbon=bow, gift=gift
box, reminder_ribbon=yellow ribbon, necktie=shirt with a tie, one-piece_swimsuit=swimsuit, folding_hand_fan=hand
fan, hair_pick=comb, billed_cap=baseball cap, ring=diamond ring, gem=gem, bulb=light bulb, flashlight=flashlight,
diya_lamp=oil lamp, vhs=video cassette, computer=laptop, headphones=headphones, musical_keyboard=piano,
musical_score=sheet of music, postal_horn=horn, package=cardboard box, memo=note, black_nib=pen nib,
spiral_note_pad=notepad, scissors=scissors, wastebasket=trash can, card_file_box=file box, page_with_curl=sheet of
paper, label=tag, carpentry_saw=saw, nut_and_bolt=bolt, probing_cane=cane, link=chain link, dna=dna,
satellite_antenna=satellite dish, adhesive_bandage=bandage, couch_and_lamp=sofa, shower=shower head,
roll_of_paper=toilet paper, shopping_trolley=shopping cart, moyai=stone head, building_construction=construction
crane, wood=log, classical_building=temple with columns, convenience_store=shop, wedding=chapel,
shinto_shrine=shinto gate, world_map=map, auto_rickshaw=rickshaw, scooter=kick scooter, fire_engine=fire truck,
fuelpump=gas pump, rotating_light=siren, construction=road barrier, octagonal_sign=stop sign, ring_buoy=life ring,
bellhop_bell=service bell, luggage=suitcase, ringed_planet=planet, zap=lightning bolt, droplet=drop of water,
ocean=ocean wave, alien=alien, space_invader=space invader, mountain_railway=mountain train, pick=pickaxe,
statue_of_liberty=statue, tokyo_tower=red tower, books=stack of books, control_knobs=control panel,
candy=piece of candy
"""

# Flags, hands, people, symbols, duplicates, and pictures that fill their own square and so hide any setting.
_EXCLUDED = """
feet pig_nose wing microbe white_flower leaves pouring_liquid mute sound loud_sound no_bell notes level_slider
calling e-mail incoming_envelope envelope_with_arrow outbox_tray inbox_tray chart chart_with_upwards_trend fish_cake
rice_scene chart_with_downwards_trend card_index_dividers bookmark_tabs x-ray elevator smoking drop_of_blood hamsa
placard seat flags identification_card hammer_and_pick hammer_and_wrench bikini briefs lock_with_ink_pen
closed_lock_with_key money_with_wings ballot_box_with_ballot mailbox_closed mailbox_with_no_mail page_facing_up
linked_paperclips film_frames globe_with_meridians japan foggy night_with_stars cityscape sunrise_over_mountains
sunrise city_sunset city_sunrise bridge_at_night hotsprings metro station busstop motorway railway_track milky_way
fireworks sparkler kaaba love_hotel camping beach_with_umbrella desert national_park house_buildings post_office
european_post_office airplane_departure airplane_arriving parachute fog wind_blowing_face cyclone partly_sunny
mostly_sunny barely_sunny partly_sunny_rain thunder_cloud_and_rain new_moon waxing_crescent_moon first_quarter_moon
moon waning_gibbous_moon last_quarter_moon waning_crescent_moon new_moon_with_face last_quarter_moon_with_face stars
tanabata_tree dolls running_shirt_with_sash spades hearts diamonds clubs flower_playing_cards sparkles broken_chain
root_vegetable brown_mushroom lime phoenix bullettrain_side coffin beans syringe prayer_beads clock2 clock3 clock4
clock5 clock6 clock7 clock9 clock11 clock12 clock130 clock230 clock330 clock530 clock630 clock730 clock830 clock930
clock1030 clock1130 clock1230 nazar_amulet
"""

_CATEGORIES = {
    "Animals & Nature/animal": "animal",
    "Animals & Nature/plant": "plant",
    "Food & Drink": "food",
    "Objects": "object",
    "Activities": "object",
    "Travel & Places/transport": "vehicle",
    "Travel & Places/place": "place",
    "Travel & Places/hotel": "object",
    "Travel & Places/sky": "sky",
    "Travel & Places/time": "object",
}
_HEARTS = ("", "orange_", "yellow_", "green_", "blue_", "purple_", "brown_", "black_", "broken_")
# The few pictures worth having from categories that are otherwise faces and body parts.
_ADOPTED = {
    "robot_face": "object",
    "alien": "object",
    "ghost": "object",
    "skull": "object",
    "space_invader": "object",
    "smiling_imp": "object",
    "imp": "object",
    "japanese_ogre": "object",
    "japanese_goblin": "object",
    "clown_face": "object",
    "smile_cat": "animal",
    "scream_cat": "animal",
    "heart_eyes_cat": "animal",
    "see_no_evil": "animal",
    "hear_no_evil": "animal",
    "love_letter": "object",
    "bone": "object",
    "tooth": "object",
    "brain": "object",
} | {f"{c}heart": "object" for c in _HEARTS}

EXAMPLE_NOUNS = ("dog", "cat", "backpack", "teapot", "robot", "car")  # of examples/subjects
# Classes that DreamBooth's own 30 subjects belong to, as far as this world has them, and our example subjects'.
SUBJECT_NOUNS = (
    "dog",
    "cat",
    "backpack",
    "teapot",
    "robot",
    "car",
    "duck",
    "teddy bear",
    "clock",
    "bowl",
    "can",
    "candle",
    "sneaker",
    "boot",
    "glasses",
    "vase",
    "toy",
    "cartoon",
)

# The nouns of the base's training (`config.vocabulary = "core"`): few enough for every member to be seen thousands of
# times, with every noun of SUBJECT_NOUNS among them.
_CORE = """
dog, cat, backpack, teapot, robot, car, duck, teddy bear, clock, bowl, can, candle, sneaker, boot, glasses, vase, toy,
cartoon, bear, bird, butterfly, chick, cow, elephant, fish, fox, frog, horse, koala, lion, monkey, mouse, owl, panda,
penguin, pig, rabbit, sheep, tiger, turtle, unicorn, whale, apple, banana, bread, cake, carrot, cup, doughnut,
hamburger, ice cream, lemon, pizza, strawberry, tomato, watermelon, balloon, bell, book, camera, guitar, hat, heart,
key, airplane, bicycle, boat, bus, rocket, train, truck, house, tree, flower, mushroom, star, umbrella
"""
CORE_NOUNS = frozenset(" ".join(_CORE.split()).split(", "))

# One meaning for a colour word everywhere: dyed sprites and plain backgrounds.
COLOURS = {
    "red": (220, 40, 45),
    "orange": (245, 140, 35),
    "yellow": (250, 215, 60),
    "green": (65, 165, 70),
    "teal": (40, 165, 165),
    "blue": (50, 100, 220),
    "purple": (135, 70, 190),
    "pink": (245, 150, 190),
    "brown": (135, 85, 50),
    "white": (245, 245, 245),
    "grey": (140, 140, 145),
    "black": (28, 28, 32),
}

# Never "a": they come in twos, in heaps, or by weight.
_PLURAL = """
glasses, eyeglasses, sunglasses, goggles, scissors, jeans, shorts, socks, gloves, headphones, maracas, chopsticks,
grapes, cherries, blueberries, pancakes, chains, bubbles, french fries, theater masks, ballet shoes, champagne glasses,
shopping bags, crossed swords
"""
_MASS = """
bread, bacon, sushi, spaghetti, popcorn, butter, custard, garlic, broccoli, corn, cheese, curry, bamboo, coral, dna,
fire, money, meat, lettuce, pizza, falafel, ice cream, toilet paper, ginger root, shaved ice, soft ice cream
"""
PLURAL, MASS = (frozenset(word.strip() for word in text.split(",")) for text in (_PLURAL, _MASS))


@dataclasses.dataclass(frozen=True)
class Name:
    """`noun`: the class; `variant`: this picture's own name; `synonyms`: other words for the class."""

    noun: str
    variant: str
    synonyms: tuple[str, ...] = ()


def _parse_classes(text: str) -> dict[str, Name]:
    names: dict[str, Name] = {}
    for line in text.strip().splitlines():
        noun, synonyms, members = (part.strip() for part in line.split("|"))
        others = tuple(s.strip() for s in synonyms.split(",") if s.strip())
        for member in members.split(","):
            short, _, variant = member.strip().partition("=")
            if short in names:
                raise ValueError(f"{short!r} is listed under {names[short].noun!r} and under {noun!r}: keep one")
            names[short] = Name(noun, variant or noun, others)
    return names


def _parse_renamed(text: str) -> dict[str, str]:
    return dict(pair.strip().split("=") for pair in text.replace("\n", " ").split(","))


CLASSES = _parse_classes(_CLASSES)
RENAMED = _parse_renamed(_RENAMED)
EXCLUDED = frozenset(_EXCLUDED.split())


def name_of(short_name: str, unicode_name: str) -> Name:
    """The name of a picture, from `short_name` and `name` of emoji-datasource's emoji.json."""
    if short_name in CLASSES:
        return CLASSES[short_name]
    noun = RENAMED.get(short_name) or unicode_name.lower().replace("’", "").removesuffix(" face")
    return Name(noun, noun)


def category_of(short_name: str, category: str, subcategory: str) -> str | None:
    """animal, plant, food, object, vehicle, place or sky; None for what the world leaves out."""
    if short_name in _ADOPTED:
        return _ADOPTED[short_name]
    if short_name in EXCLUDED:
        return None
    path = f"{category}/{subcategory}"
    return next((kind for prefix, kind in _CATEGORIES.items() if path.startswith(prefix)), None)


def with_article(phrase: str) -> str:
    """ "an apple", "a bowl of rice"; plurals and substances stay bare: "glasses", "bread"."""
    if phrase in PLURAL or phrase in MASS:
        return phrase
    vowel_letter = phrase[0] in "aeiou" and not phrase.startswith(("uni", "use"))
    return ("an " if vowel_letter or phrase.startswith("hour") else "a ") + phrase
