"""The embedded data set `clutter`: small textured objects on large, varied backgrounds.

Each picture shows one object about a quarter to a third of the picture across, in a random place. Its texture is
its class (`stripes_horizontal`, `checkers`, ...). Everything else is there to be ignored: a background of soft
colours, and two to four distractors of the object's size, outlines and colours, plain or with textures that are
no class. So "a blob is there" says nothing, and neither do outline, colour or the picture's mean.

A picture's texture is fixed to the picture's grid, not to the object: an object is a hole through which a cloth of
period 4 or 8 units shows (a unit is a 64th of the picture's width), lighter or darker colour first as chance has
it. With patches of 8 units every patch inside an object of a class then shows the same pattern or its negative.
That is what lets a small ViT learn the classes from scratch in some hundred steps; with a free phase it takes
thousands. Every class turned left to right is still of its class.

On disk it is an ordinary image folder with the objects' masks in a parallel one:

    clutter.json                           the configuration, and the mark that the folder is complete
    train/<class>/<index>.png              RGB
    val/<class>/<index>.png
    masks/train/<class>/<index>.png        L, 255 on the object's pixels, 0 elsewhere
    masks/val/<class>/<index>.png

A picture is a pure function of (seed, split, class, index). It is computed from `Generator.random` by additions,
multiplications, divisions and comparisons of float64 only, element by element: those round alike on every machine
and release, which sines, powers, matrix products and long sums do not.
"""

import json
import os
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Optional

import numpy as np
from PIL import Image

from skipvit.config import UserError
