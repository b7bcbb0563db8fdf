"""ObjectNet on disk: objectnet-1.0/images/OBJECT/*.png, 313 objects, of which 113 are classes of ImageNet.

The map is that of the archive's own mappings/ (ObjectNet, Barbu et al. 2019, CC BY 4.0).
"""

from pathlib import Path

from transfer.data.findings import Data, found, incomplete, missing, unusable
from transfer.data.imagenet import read_split
from transfer.data.split import Split, fingerprint

MAPPED = """
    alarm_clock=409+530 backpack=414 banana=954 band_aid=419 basket=790 beer_bottle=440 bench=703 bicycle=444+671
    binder_closed=446 bottle_cap=455 bread_loaf=930 broom=462 bucket=463 butchers_knife=499 can_opener=473
    candle=470 cellphone=487 chair=423+559+765 clothes_hamper=588 coffee_french_press=550 combination_lock=507
    computer_mouse=673 desk_lamp=846 doormat=539 dress=578 dress_shoe_men=630 drill=740 drinking_cup=968
    drying_rack_for_dishes=729 envelope=549 fan=545 frying_pan=567 full_sized_towel=434 hair_dryer=589 hammer=587
    hand_towel_or_rag=533 helmet=518+560 iron_for_clothes=606 jeans=608 keyboard=508 ladle=618 lampshade=619
    laptop_open=620 lemon=951 letter_opener=623 lighter=626 lipstick=629 match=644 measuring_cup=647 microwave=651
    mixing_salad_bowl=659 monitor=664 mug=504 nail_fastener=677 necklace=679 orange=950 padlock=695 paintbrush=696
    paper_towel=700 pen=418+563+749 pill_bottle=720 pillow=721 pitcher=725 plastic_bag=728 plate=923 plunger=731
    pop_can=737 portable_heater=811 printer=742 remote_control=761 ruler=769 running_shoe=770 safety_pin=772
    salt_shaker=773 sandal=774 screw=783 shovel=792 skirt=601+655+689 sleeping_bag=797 soap_dispenser=804 sock=806
    soup_bowl=809 spatula=813 speaker=632 still_camera=732+759 strainer=828 stuffed_animal=850 suit_jacket=834
    sunglasses=837 sweater=841 swimming_trunks=842 t-shirt=610 teapot=849 tennis_racket=752 tie=457+906 toaster=859
    toilet_paper_roll=999 trash_bin=412 tray=868 tv=851 umbrella=879 vacuum_cleaner=882 vase=883 wallet=893
    watch=531 water_bottle=898 weight_exercise=543 weight_scale=778 wheel=479+694 whistle=902 wine_bottle=907
    winter_glove=658 wok=909
"""
OTHER_OBJECTS = """
    air_freshener baking_sheet baseball_bat baseball_glove bathrobe battery bed_sheet beer_can belt bike_pump
    bills_money biscuits blanket blender blouse board_game book_closed bookend boots bottle_opener bottle_stopper
    box bracelet bread_knife briefcase brooch butter button calendar canned_food cd_case cellphone_case
    cellphone_charger cereal cheese chess_piece chocolate chopstick clothes_hanger coaster coffee_beans
    coffee_grinder coffee_machine coffee_table coin_money comb contact_lens_case cooking_oil_bottle cork
    cutting_board deodorant detergent dish_soap document_folder_closed dog_bed drawer_open dress_pants dress_shirt
    dress_shoe_women drinking_straw drying_rack_for_clothes dust_pan dvd_player earbuds earring egg egg_carton
    eraser_white_board extension_cable eyeglasses figurine_or_statue first_aid_kit flashlight floss_container
    flour_container fork glue_container hair_brush hairclip hairtie hand_mirror handbag hat headphones_over_ear
    honey_container ice ice_cube_tray ironing_board jam jar kettle key_chain laptop_charger leaf leggings lettuce
    light_bulb loofah magazine makeup makeup_brush marker milk mouse_pad mouthwash multitool nail_clippers nail_file
    nail_polish napkin newspaper night_light nightstand notebook notepad nut_for_screw oven_mitts paint_can paper
    paper_bag paper_plates paperclip peeler pencil pepper_shaker pet_food_container phone_landline
    photograph_printed pill_organizer placemat plastic_cup plastic_wrap playing_cards pliers poster power_bar
    power_cable raincoat rake razor receipt removable_blade ribbon ring rock rolling_pin scarf scissors scrub_brush
    sewing_kit shampoo_bottle shoelace shorts skateboard slipper soap_bar sponge spoon spray_bottle squeegee
    squeeze_bottle standing_lamp stapler step_stool stopper_sink_tub sugar_container suitcase table_knife tablecloth
    tablet_ipad tanktop tape tape_measure tarp teabag thermometer thermos throw_pillow tissue tomato tongs
    toothbrush toothpaste tote_bag toy trash_bag travel_case trophy tweezers usb_cable usb_flash_drive video_camera
    walker walking_cane water_filter webcam whisk wine_glass wrench ziploc_bag
"""
# Folder -> the classes of ImageNet-1k (0..999) that are right for it.
OBJECTS = {
    folder: tuple(map(int, classes.split("+"))) for folder, _, classes in (p.partition("=") for p in MAPPED.split())
}
# The folders of the 200 objects that no class of ImageNet means.
OTHERS = frozenset(OTHER_OBJECTS.split())
FOLDERS = ("objectnet-1.0/images", "objectnet/images")
OFFICIAL = {"classes": 113, "images": 18574}
BORDER = 2  # px of red around every image, by which its use in training would be noticed


def folder_of(root: Path) -> Path | None:
    return next((root / name for name in FOLDERS if (root / name).is_dir()), None)


def read_objectnet(folder: Path) -> tuple[Split, list[str]]:
    """The images of the 113 objects; an image's label is the first of its object's classes."""
    remedy = "it has those of the archive's folder images/; move others away"
    return read_split(folder, {name: classes[0] for name, classes in OBJECTS.items()}, OTHERS, remedy)


def accepted_classes(split: Split) -> list[tuple[int, ...]]:
    """All classes that are right for each image."""
    return [OBJECTS[file.parent.name] for file in split.files]


def inspect_objectnet(root: Path) -> Data:
    """ObjectNet below root."""
    folder = folder_of(root)
    if folder is None:
        return missing(root, f"ObjectNet must lie at {root / FOLDERS[0]}/OBJECT/*.png, as its archive unpacks")
    split, problems = read_objectnet(folder)
    problems += unusable(split.files)
    if problems:
        return incomplete(root, *problems)
    there = {file.parent.name for file in split.files}
    absent = [name for name in OBJECTS if name not in there]
    counts = {"classes": len(there), "images": len(split.files)}
    detail = f"{counts['classes']} of 113 objects, {counts['images']} images"
    chance = sum(map(len, accepted_classes(split))) / len(split.files) / 10  # percent of 1000 classes
    return found(root, folder, detail, fingerprint(root, split), counts, OFFICIAL, absent, chance)
