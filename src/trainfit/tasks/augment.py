"""Augmentation of training images: presets, single switches, and transforms of the user. Imports no torch."""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from trainfit.errors import TrainfitError

OWN = frozenset({"crop", "flip"})
"""Augmentations that a family's decoder may apply by itself, because it is cheaper there or keeps more of the pixels."""
SWITCHES = ("crop", "flip", "colour", "scale")
COLOUR = 0.2
"""Strength of --augment colour: brightness, contrast and saturation are multiplied by 1 - COLOUR to 1 + COLOUR."""
SCALE = (0.8, 1.25)
"""Range of --augment scale."""
CROP_SIDE = 0.6
"""Least side of a crop over the image's, where the family's decoder draws none."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is drawn for every image of training; evaluation draws nothing."""

    own: frozenset[str] = frozenset()
    """Augmentations of `OWN` that the family's decoder applies."""
    crop: bool = False
    """Resize a part of the image to the image's size, after decoding, half of the time."""
    flip: bool = False
    """Mirror the image from left to right, after decoding, half of the time."""
    turns: bool = False
    """Turn the image upside down, after decoding, half of the time, and square images by quarters."""
    colour: float = 0.0
    """Strength of changes in brightness and contrast; 0 turns them off."""
    saturation: bool = False
    """Whether `colour` changes the saturation too."""
    scale: tuple[float, float] | None = None
    """Range of a zoom about a point drawn at random."""
    function: str = ""
    """"module:name" of a callable that is given every decoded sample, after everything else; "" for none."""

    @property
    def after_decoding(self) -> bool:
        """Whether samples change after the family's decoder."""
        return self != Augmentation(own=self.own)


@dataclass(frozen=True, kw_only=True)
class _Preset:
    """What a preset draws; `flip` and `turns` only in families whose own augmentation flips."""

    names: frozenset[str] = frozenset()
    """Switches that it turns on."""
    turns: bool = False
    """Whether it turns images upside down and by quarters."""
    colour: float = 0.0
    """The largest change of brightness and contrast, as a share."""
    scale: tuple[float, float] | None = None
    """(least, most) factor of the size; None: the size stays."""


PRESETS = {
    "none": _Preset(),
    "light": _Preset(names=frozenset({"flip"}), colour=0.1),
    "default": _Preset(names=OWN),
    "aerial": _Preset(names=OWN, turns=True, colour=0.15, scale=(0.75, 1.33)),
    "medical": _Preset(colour=0.1, scale=(0.9, 1.1)),
}
"""Sources of the flips and strengths are in docs/augmentation.md. medical neither mirrors nor crops: sides of a
body and whole organs keep their place."""
_FUNCTION = re.compile(r"[\w.]+:\w+")


def parse(text: str, family: frozenset[str] = OWN) -> Augmentation:
    """The augmentation of `--augment TEXT`: a preset, then switches, then a function, separated by commas.

    Without a preset it is `default`, or `none` where there is a function alone.

    Args:
        text: For instance "aerial", "default,no-flip,colour" or "my_module:my_transform".
        family: What the family's decoder draws by itself (`Family.augments`).

    Raises:
        TrainfitError: a word is none of these.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    functions = [word for word in words if _FUNCTION.fullmatch(word)]
    if len(functions) > 1:
        raise TrainfitError(f"--augment {text}: name one function; it may call others")
    rest = [word for word in words if word not in functions]
    name = "default"
    switches = rest
    if rest and rest[0] in PRESETS:
        name, *switches = rest
    elif functions and not rest:
        name = "none"
    preset = PRESETS[name]
    wanted = set(family)
    if name != "default":
        wanted = set(preset.names & (OWN if "flip" in family else family))
    colour = preset.colour
    scale = preset.scale
    for word in switches:
        switch = word.removeprefix("no-").replace("color", "colour")
        on = not word.startswith("no-")
        if switch not in SWITCHES:
            raise TrainfitError(_unknown(text, word))
        if switch == "colour":
            colour = (colour or COLOUR) if on else 0.0
        elif switch == "scale":
            scale = (scale or SCALE) if on else None
        elif on:
            wanted.add(switch)
        else:
            wanted.discard(switch)
    return Augmentation(
        own=frozenset(wanted & family),
        crop="crop" in wanted - family,
        flip="flip" in wanted - family,
        turns=preset.turns and "flip" in wanted,
        colour=colour,
        saturation=colour >= COLOUR,
        scale=scale,
        function=functions[0] if functions else "",
    )


def _unknown(text: str, word: str) -> str:
    known = [*PRESETS, *SWITCHES, *(f"no-{name}" for name in SWITCHES)]
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f" Perhaps you meant {near[0]}." if near else ""
    return (
        f"--augment {text}: {word!r} is not an augmentation.{hint} Give one of {', '.join(PRESETS)}, then switches "
        f"({', '.join(SWITCHES)}, or no- before one of them), or module:name of your own"
    )
