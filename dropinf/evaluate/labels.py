"""Do wrong labels come first?"""

from __future__ import annotations

import torch
from torch import Tensor

from dropinf.evaluate.estimates import Estimate, mask_of, numbers_of


def mislabeled_auc(values: Tensor, wrong: Tensor) -> Estimate:
    """The area under the ROC curve of finding wrong labels by the largest values.

    It is the probability that an example with a wrong label has a larger value than one with a
    right label, where a tie counts a half: 0.5 by chance.

        print(dropinf.evaluate.mislabeled_auc(own, wrong))

    Args:
        values: [n], large where a label is suspicious: self-influence or the loss as they are, but
            *minus* the mean influence on good queries (`-scores.nanmean(0)`), which is low where a
            label is wrong. NaN, an invalid example, is left out.
        wrong: [n] bool.

    Returns:
        The area; `error` is DeLong's standard error (DeLong, DeLong and Clarke-Pearson 1988,
        Biometrics 44, 837), for other examples with as many wrong labels.

    Raises:
        ValueError: shapes do not agree, or no valid example is wrong, or none is right.
    """
    values = numbers_of("mislabeled_auc", "values", values)
    if values.dim() != 1:
        raise ValueError(
            f"mislabeled_auc: values must be [n], a number for each example, got "
            f"{list(values.shape)}; of scores [m, n] take -scores.nanmean(0)"
        )
    wrong = mask_of("mislabeled_auc", "wrong", wrong, (len(values),))
    valid = ~values.isnan()
    bad, good = values[valid & wrong], values[valid & ~wrong]
    if not len(bad) or not len(good):
        raise ValueError(
            f"mislabeled_auc: needs examples of both kinds, got {len(bad)} with a wrong label and "
            f"{len(good)} with a right one that are valid"
        )
    above = _share_below(good, bad)  # of each wrong one: how many right ones it stands above
    area = above.mean()
    below = 1 - _share_below(bad, good)
    variance = _variance(above) / len(bad) + _variance(below) / len(good)
    return Estimate(float(area), float(variance.sqrt()), left_out=int((~valid).sum()))


def _share_below(others: Tensor, values: Tensor) -> Tensor:
    """[b] of values [b]: the share of `others` that is smaller, ties counting a half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.double() / (2 * len(others))


def _variance(shares: Tensor) -> Tensor:
    return shares.var() if len(shares) > 1 else torch.tensor(torch.nan)
