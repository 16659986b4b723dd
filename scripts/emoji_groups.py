"""Groups of emoji that show one thing: in other genders and skin tones, or by the same picture."""

import re
from collections.abc import Mapping

# Code points of a gender -> those of the same thing in none; also within longer sequences.
WITHIN = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man, woman -> person
WITHIN |= {"1f466": "1f9d2", "1f467": "1f9d2"}  # boy, girl -> child
WITHIN |= {"1f474": "1f9d3", "1f475": "1f9d3"}  # older man, older woman -> older person
WHOLE = {
    "1f385": "1f9d1-200d-1f384",  # Father Christmas -> Mx Claus
    "1f936": "1f9d1-200d-1f384",  # Mother Christmas
    "1f934": "1fac5",  # prince -> person with crown
    "1f478": "1fac5",  # princess
    "1f930": "1fac4",  # pregnant woman -> pregnant person
    "1fac3": "1fac4",  # pregnant man
    "1f57a": "1f483",  # man dancing -> dancer
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1",  # man and woman -> people holding hands
    "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",  # two men
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",  # two women
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couples with heart
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kisses
    "2640": "2642",  # female sign, male sign
    "1f6ba": "1f6b9",  # womens symbol, mens symbol
}
SIGN = re.compile(r"-200d-(2640|2642)")  # "woman", "man", after what they do
FAMILY = re.compile(r"1f9d1(-200d-1f9d1)?(-200d-1f9d2)+")


def neutral(code: str) -> str:
    """Code points of the same thing in no particular gender and skin tone.

    By code points, since names do not tell: a RUNNER may be a MAN RUNNING, a SHRUG a WOMAN
    SHRUGGING. `code` is without fe0f ("1f3c3-1f3fb-200d-2642").
    """
    parts = [part for part in code.split("-") if not re.fullmatch("1f3f[b-f]", part)]
    code = SIGN.sub("", "-".join(WITHIN.get(part, part) for part in parts))
    return "1f46a" if FAMILY.fullmatch(code) else WHOLE.get(code, code)


def groups_of(name_of: Mapping[str, str], picture_of: Mapping[str, bytes]) -> dict[str, str]:
    """Key of an image -> its group, named as what is shown in no particular gender.

    Args:
        name_of: name of the neutral thing that the image with this key shows.
        picture_of: equal ones (territories under one flag) are in one group.
    """
    group_of, first_with = {}, {}  # of names, of pictures
    for key in sorted(name_of):
        old, new = (
            group_of.setdefault(name, name)
            for name in (name_of[key], first_with.setdefault(picture_of[key], name_of[key]))
        )
        group_of = {name: new if group == old else group for name, group in group_of.items()}
    return {key: group_of[name] for key, name in name_of.items()}
