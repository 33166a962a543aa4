"""The whole paper on a folder of one's own, `<split>/<class>/<file>`, of any size.

`python launch.py --config=configs/folder.py --data_dir=<folder>`; a folder without a test split
needs `--config.data.resplit_per_class=<images of each class to hold out>`, one of hundreds of
classes `--config.occlusion.top_classes=5`. What is not said here is as in `occjax/config.py`.
"""

from occjax.config import Attack, Classifier, Config, Data, Detector, Occlusion


def get_config() -> Config:
    """Returns an experiment on images of 64 pixels: enough for photographs, and for a CPU."""
    return Config(
        data=Data(name='folder', image_size=64),  # ours, as all below that names no section
        classifier=Classifier(
            hidden=512,  # for fewer classes and pixels than Table I's 4096
            epochs=10,  # §III-B, as CIFAR-10
            epoch_steps=20,  # a folder of forty images is seen two hundred times
            batch_size=64,
            learning_rate=1e-3,
        ),
        attack=Attack(epsilon=0.1),  # §I, Fig. 1
        occlusion=Occlusion(
            size=16,  # a quarter of the side; §III-D has 15 of 32
            stride=6,  # 8 x 8 windows; §III-D has 5
            train_images=1000,  # of a larger folder not all: each takes a second or so
            test_images=1000,
        ),
        detector=Detector(
            steps=300,
            batch_size=32,  # a class may have some twenty maps of each kind
            held_out_fit_fraction=0.4,  # the paper holds nothing out
            held_out_threshold_fraction=0.2,  # the paper has no thresholds but 0
            methods=('detector', 'all_logits'),  # The others are a flag away.
        ),
    )
