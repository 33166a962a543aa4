"""The whole paper on a folder of one's own, `<split>/<class>/<file>`.

`python launch.py --config=configs/folder.py --data_dir=<folder>`; a folder without a test split
needs `--config.data.resplit_per_class=<images of each class to hold out>`.
"""

from occjax.config import Attack, Classifier, Config, Data, Detector, Occlusion


def get_config() -> Config:
    return Config(
        data=Data(
            name='folder',
            image_size=64,  # ours: large enough for photographs, small enough for a CPU
            resplit_per_class=None,  # ours: keeps the folder's own train and test
        ),
        classifier=Classifier(
            plan='vgg11',  # §III-B, Table I
            hidden=512,  # ours: as for CIFAR-10; the paper has no images of this size
            epochs=10,  # §III-B, as CIFAR-10
            batch_size=64,  # ours: not stated
            learning_rate=1e-3,  # ours: not stated
            dropout_rate=0.5,  # ours: Table I has the layers without their rate
            normalize=True,  # ours: not stated; mean and std of the training images
        ),
        attack=Attack(
            epsilon=0.1,  # §I, Fig. 1
            clip=True,  # ours: not stated; attacked images stay images
        ),
        occlusion=Occlusion(
            size=16,  # ours: a quarter of the side; §III-D has 15 of 32
            stride=6,  # ours: 9 x 9 windows; §III-D has 5
            fill=(0.5,),  # ours: not stated; grey
            grid='paper',  # §III-C
        ),
        detector=Detector(
            steps=300,  # ours: not stated
            batch_size=128,  # ours: not stated
            learning_rate=1e-3,  # ours: not stated
            balance='undersample',  # ours: not stated; without it Tables IV, V make no sense
            paper_fit_fraction=0.8,  # ours: not stated
            held_out_fit_fraction=0.4,  # ours: the paper holds nothing out
            held_out_threshold_fraction=0.2,  # ours: the paper has no thresholds but 0
        ),
    )
