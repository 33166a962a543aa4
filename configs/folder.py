r"""The whole paper on a folder of one's own, `<split>/<class>/<file>`, of 2 to 1,000 classes.

`python launch.py --config=configs/folder.py --data_dir=<folder>`. What is not said here is as in
`occjax/config.py`. A class with too few maps, to learn from or for a threshold of its own, is named
with what helps.

- Without a test split: `--config.data.resplit_per_class=<images of each class to hold out>`.
- With hundreds of classes: `--config.occlusion.top_classes=5`. Maps keep the logits of the five
  likeliest classes and of the others together, which leaves their probabilities exact; a map of 196
  windows and 1,000 classes takes 9 kB and not 784.
- Detectors that see more than FGSM of one size are fitted on a mixture of attacks, and
  `--mode=detect` asks them from then on:

      python launch.py --config=configs/folder.py --data_dir=<folder> --mode=sweep \
          --config.sweep.noise --config.sweep.windows=False \
          "--config.sweep.methods=('views_alone',)" "--config.sweep.attacks=('pgd','square')" \
          "--config.sweep.mixture=('fgsm','pgd','square')" \
          "--config.sweep.views=('flip','shift','grey','blur','bits','noise')"
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
            train_images=1000,  # of more not all, a second each; 0 is all, and more may follow
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
