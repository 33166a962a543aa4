"""The numbers that the paper gives, once and as plain data, for the side-by-side columns.

What follows from them by arithmetic alone is a property and says so; nothing else is added.
"""

from collections.abc import Sequence
from typing import NamedTuple

PARAMETERS = 128_812_810  # Sum of Table I's last column, for 224×224 images and ten classes.


class Paper(NamedTuple):
    """What the paper reports for one of its two datasets; classes in the order of §III-A."""

    dataset: str
    train_images: int  # §III-A
    test_accuracy: float  # §III-B
    epsilon: float | None  # Figure 1, the only one in the paper
    counts_table: str  # where `counts` are: Table II or III
    counts: dict[str, tuple[int, int]]  # {class: (correct, adversarial)} heatmaps
    accuracy_table: str  # where `accuracy` is: Table IV or V
    accuracy: dict[str, float]  # {class: the detector's accuracy}
    overall: float  # Table VI

    @property
    def correct(self) -> int:
        """Correct heatmaps of all classes (computed from Table II or III)."""
        return sum(correct for correct, _ in self.counts.values())

    @property
    def adversarial(self) -> int:
        """Adversarial heatmaps of all classes (computed from Table II or III)."""
        return sum(adversarial for _, adversarial in self.counts.values())

    @property
    def train_accuracy(self) -> float:
        """Share of training images with a correct heatmap (computed from Table II or III)."""
        return self.correct / self.train_images

    @property
    def attack_success(self) -> float:
        """Adversarial heatmaps per correct one (computed from Table II or III)."""
        return self.adversarial / self.correct


CIFAR10 = Paper(
    dataset='CIFAR-10',
    train_images=50_000,
    test_accuracy=0.78,
    epsilon=None,
    counts_table='Table III',
    counts={
        'Airplane': (4586, 699),
        'Automobile': (4860, 977),
        'Bird': (4430, 6637),
        'Cat': (3669, 2367),
        'Deer': (3963, 5785),
        'Dog': (3630, 337),
        'Frog': (4593, 18211),
        'Horse': (4364, 441),
        'Ship': (4562, 1145),
        'Truck': (4641, 1237),
    },
    accuracy_table='Table IV',
    accuracy={
        'Airplane': 0.65,
        'Automobile': 0.63,
        'Bird': 0.67,
        'Cat': 0.69,
        'Deer': 0.70,
        'Dog': 0.50,
        'Frog': 0.56,
        'Horse': 0.56,
        'Ship': 0.73,
        'Truck': 0.68,
    },
    overall=0.64,
)

IMAGENETTE = Paper(
    dataset='Imagenette',
    train_images=12_394,
    test_accuracy=0.81,
    epsilon=0.1,
    counts_table='Table II',
    counts={
        'Tench': (1207, 829),
        'English Springer': (1164, 449),
        'Cassette Player': (1091, 356),
        'Chain Saw': (919, 1438),
        'Church': (1122, 2260),
        'French Horn': (1063, 309),
        'Garbage Truck': (1107, 405),
        'Gas Pump': (1100, 1143),
        'Golf Ball': (1154, 1249),
        'Parachute': (1175, 601),
    },
    accuracy_table='Table V',
    accuracy={
        'Tench': 0.75,
        'English Springer': 0.73,
        'Cassette Player': 0.78,
        'Chain Saw': 0.73,
        'Church': 0.61,
        'French Horn': 0.70,
        'Garbage Truck': 0.75,
        'Gas Pump': 0.75,
        'Golf Ball': 0.81,
        'Parachute': 0.89,
    },
    overall=0.75,
)


def numbers(class_names: Sequence[str]) -> Paper | None:
    """Returns the paper's numbers for the dataset with these classes, None for another dataset.

    The order of the classes doesn't matter: a folder lists them by name.

    >>> numbers(('Zero', 'One')) is None
    True
    """
    for paper in (CIFAR10, IMAGENETTE):
        if sorted(class_names) == sorted(paper.counts):
            return paper
    return None
