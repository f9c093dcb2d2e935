"""From pictures to the codes that a prior is trained on: every picture encoded once, with its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.data import PictureFolder
from vqfast.data.draws import Draws
from vqfast.train.config import ConfigError
from vqfast.train.evaluate import encode_pictures
from vqfast.train.ranks import Ranks

_VIEW = 2  # a counter of its own beside those of vqfast.data.loader


class Codes(NamedTuple):
    """The codes of many pictures.

    levels: int64 [N, rows, columns] each, finest first. labels: int64 [N], or None. classes: the labels' names.
    """

    levels: list[Tensor]
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.levels[0])

    def rows(self, index: Tensor, level: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """(codes, labels or None, codes of the level above or None) of some pictures: what a prior is called with."""
        above = self.levels[level + 1] if level + 1 < len(self.levels) else None
        return tuple(
            None if t is None else t[index.to(t.device)].to(device) for t in (self.levels[level], self.labels, above)
        )


class RowNumbers:
    """The data set of a prior's loader: the numbers 0 to count - 1, 0-d int64 each."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, draws: Draws) -> Tensor:
        return torch.tensor(index)


class Crops:
    """The centre crops of a data set's pictures, which may be larger.

    Args:
        height, width: of the crops, pixels.
    """

    def __init__(self, dataset, height: int, width: int):
        self.dataset, self.size = dataset, (height, width)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 [C, height, width]. Raises ConfigError for a smaller picture."""
        picture = self.dataset[index]
        if any(have < want for have, want in zip(picture.shape[1:], self.size)):
            raise ConfigError(
                f"a picture to judge by has {picture.shape[2]}x{picture.shape[1]} pixels, fewer than the crops of "
                f"{self.size[1]}x{self.size[0]}; name larger ones with data.test"
            )
        top, left = ((have - want) // 2 for have, want in zip(picture.shape[1:], self.size))
        return picture[:, top : top + self.size[0], left : left + self.size[1]]


@torch.no_grad()
def encode_dataset(
    model: torch.nn.Module,
    dataset,
    ranks: Ranks,
    *,
    views: int = 0,
    limit: int = 0,
    seed: int = 0,
    labels: bool = False,
    classes: Sequence[str] = (),
    batch: int = 64,
) -> Codes:
    """The codes of a data set; every process encodes its share and gets all.

    Args:
        model: on the ranks' device.
        dataset: of uint8 pictures of one size.
        views: random samples of each picture, a function of (seed, view, picture); 0: the picture as it is.
        limit: use at most so many pictures, evenly spread; 0: all.
        labels: take the pictures' classes along.
        classes: their names in order, when another part of the data has set them.

    Raises:
        ConfigError: no pictures, none that can be read, or no labels.
    """
    total = len(dataset)
    count = min(total, limit) if limit else total
    if not count:
        raise ConfigError("there are no pictures to learn from")
    pictures = [i * total // count for i in range(count)]
    jobs = [(view, picture) for view in range(max(1, views)) for picture in pictures]
    # Shares of one length, because a gather needs it: the last jobs may be done twice.
    share = [jobs[min(i, len(jobs) - 1)] for i in range(ranks.rank, _up(len(jobs), ranks.world_size), ranks.world_size)]

    def open_one(view: int, picture: int) -> Tensor:
        try:
            return dataset.sample(picture, Draws(seed, _VIEW, view, picture)) if views else dataset[picture]
        except ValueError as error:  # pictures that cannot be used are the user's to put right
            raise ConfigError(str(error)) from None

    parts = []
    for begin in range(0, len(share), batch):
        pixels = torch.stack([open_one(*job) for job in share[begin : begin + batch]])
        parts.append(encode_pictures(model, pixels)[0])
    levels = [torch.cat(level) for level in zip(*parts)]
    whole = [torch.stack(ranks.gather(level), dim=1).flatten(0, 1)[: len(jobs)].cpu() for level in levels]
    if not labels:
        return Codes(whole)
    found, names = labels_of(dataset, classes)
    return Codes(whole, found[torch.tensor([picture for _, picture in jobs])], names)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def labels_of(dataset, classes: Sequence[str] = ()) -> tuple[Tensor, tuple[str, ...]]:
    """The class of each picture, int64 [N], and the classes' names.

    A folder's classes are its sub-folders. A picture that was skipped was replaced by the next readable one, so it has
    that one's class: ask after the pictures were read.

    Raises:
        ConfigError: the data set has no classes, or one that is not among `classes`.
    """
    if isinstance(dataset, Crops):
        return labels_of(dataset.dataset, classes)
    if not isinstance(dataset, PictureFolder):
        return dataset.labels, tuple(dataset.classes)
    parts = [path.relative_to(dataset.folder).parts for path in dataset.paths if dataset.folder.is_dir()]
    if not parts or min(map(len, parts)) < 2:
        raise ConfigError(
            f"the pictures in {dataset.folder} have no labels: every picture must lie in a folder named after its class; "
            "leave out --labels to train without"
        )
    names = tuple(classes) or tuple(sorted({part[0] for part in parts}))
    unknown = {part[0] for part in parts} - set(names)
    if unknown:
        raise ConfigError(f"{dataset.folder} has the class {min(unknown)!r}, which the training pictures have not")
    own = [names.index(part[0]) for part in parts]
    readable = [path not in dataset.skipped for path in dataset.paths]
    for index in range(2 * len(own) - 1, -1, -1):  # twice around, since the last picture's next is the first
        place, following = index % len(own), (index + 1) % len(own)
        if not readable[place]:
            own[place] = own[following]
    return torch.tensor(own), names
