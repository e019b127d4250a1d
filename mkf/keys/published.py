"""The eight keys that the paper publishes."""

import numpy as np

from mkf.keys.key_set import KeySet

NAMES = ("1", "2", "3", "4", "5", "6", "7", "8")

# The direction in which the positive lobe lies tells the four one-sided differences apart.
KINDS = (
    "one-sided difference in y, + below",
    "one-sided difference in x, + right",
    "one-sided difference in y, + above",
    "one-sided difference in x, + left",
    "central difference in x, + left",
    "central difference in y, + below",
    "difference of Gaussians",
    "Gaussian",
)

FIGURE_9 = """
-.01 -.02 -.01 -.00 -.01 -.02 -.01
-.02 -.02 -.00  .00 -.01 -.02 -.01
-.01 -.02  .01 -.11 -.00 -.01 -.01
-.03 -.05 -.09 -.23 -.06 -.05 -.03
-.03 -.06  .02  .94  .04 -.06 -.03
-.02 -.02  .00  .12  .01 -.02 -.02
-.02 -.02  .01  .09  .00 -.02 -.02

-.00 -.01 -.02 -.05 -.04 -.02 -.00
-.02 -.02 -.02 -.04 -.03 -.02 -.03
-.02 -.00 -.01 -.06  .06 -.01 -.01
 .00  .04 -.06 -.46  .85  .13  .07
 .00  .01  .01 -.12  .07  .02  .01
-.01 -.01 -.01 -.05 -.03 -.01 -.01
 .00 -.01 -.01 -.04  .00 -.01  .00

-.03 -.02 -.02  .07 -.02 -.03 -.03
-.03 -.02  .01  .14  .01 -.02 -.03
-.03 -.04  .10  .88  .11 -.05 -.04
-.02 -.02 -.08 -.36 -.09 -.03 -.03
-.02 -.00 -.05 -.14 -.05 -.01 -.02
-.01 -.01  .01  .01  .00 -.01 -.01
-.01  .00  .00  .01  .01  .00 -.00

-.04 -.03 -.02 -.01  .00 -.00 -.01
-.04 -.01 -.04 -.01  .03  .01 -.01
-.01  .00  .03 -.05  .00  .02  .01
 .04  .08  .87 -.35 -.30 -.00 -.00
-.02  .00  .05 -.01 -.05 -.00 -.00
-.03 -.01 -.01  .00  .00  .00 -.02
-.04 -.02 -.01 -.01 -.00 -.00 -.00

 .05  .02  .04  .01 -.04 -.02 -.07
 .04  .03  .05  .02 -.02 -.01 -.07
 .10  .09  .19  .02 -.17 -.06 -.09
 .20  .20  .54 -.03 -.53 -.20 -.22
 .09  .08  .19  .01 -.22 -.09 -.11
 .04  .03  .07  .01 -.04 -.02 -.07
 .05  .02  .05 -.00 -.04 -.03 -.07

-.07 -.05 -.08 -.16 -.07 -.04 -.06
-.03 -.01 -.06 -.14 -.04  .00 -.03
-.03 -.04 -.22 -.47 -.22 -.03 -.04
-.01 -.01  .01  .02  .01 -.00  .00
 .02  .03  .20  .68  .20  .02  .03
-.00  .02  .06  .16  .05  .01  .01
 .02  .03  .05  .14  .06  .03  .04

-.01 -.01 -.01 -.02 -.02 -.00 -.01
-.01 -.00 -.02 -.05 -.01 -.00 -.01
-.01 -.01 -.04 -.06 -.05 -.01 -.01
-.01 -.03 -.01  .98 -.02 -.04 -.02
-.01 -.01 -.05 -.07 -.06 -.02 -.02
-.01 -.01 -.01 -.05 -.01 -.00 -.01
-.01 -.01 -.02 -.03 -.02 -.01 -.01

-.04 -.04 -.04 -.02 -.04 -.03 -.04
-.04 -.03 -.04 -.04 -.04 -.03 -.04
-.04 -.04 -.02  .16 -.01 -.04 -.04
-.02 -.04  .16  .92  .15 -.04 -.02
-.04 -.05 -.03  .15 -.03 -.05 -.04
-.04 -.03 -.04 -.04 -.04 -.03 -.04
-.04 -.04 -.04 -.02 -.04 -.03 -.04
"""


def paper8() -> KeySet:
    """The eight master key filters as the paper prints them, (8, 7, 7).

    These are the figures of Figure 9 of "The Quest for Universal Master Key Filters in DS-CNNs" (Babaiee, Kiasari,
    Rus, Grosu; NeurIPS 2025), which have two decimals, then centred and scaled to norm 1. That is within a cosine of
    .9997 of the same keys in six decimals, which the authors publish as a text file in
    https://github.com/tonylindeberg/masterfiltmodel and which `KeySet.load(path)` reads.
    """
    figures = np.array(FIGURE_9.split(), dtype=np.float64).reshape(8, 7, 7)
    return KeySet(
        figures - figures.mean((1, 2), keepdims=True),
        NAMES,
        KINDS,
        provenance="Figure 9 of Babaiee et al., The Quest for Universal Master Key Filters in DS-CNNs, NeurIPS 2025",
    )
