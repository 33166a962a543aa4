"""The whole experiment on a small VGG and a handful of digits, for the tests of several modules."""

from configs import digits
from occjax.experiment import run as run_lib
from occjax.experiment import stages, storage

SMALL = (8, 'M', 16, 'M')


def get_config():
    """Returns an experiment that takes seconds; its attack succeeds often and for many classes."""
    config = digits.get_config()
    config.data.image_size, config.data.resplit_per_class = 16, 80
    config.data.train_images, config.data.test_images = 300, 200
    config.classifier.hidden, config.classifier.epochs = 32, 3
    config.classifier.batch_size, config.classifier.learning_rate = 32, 3e-3
    config.attack.epsilon = 0.3
    config.occlusion.size, config.occlusion.stride = 5, 4
    config.occlusion.train_images = config.occlusion.test_images = 0
    config.detector.steps, config.detector.seeds = 30, 3
    config.detector.batch_size = 128
    config.detector.methods = ('detector', 'linear_probe', 'all_logits')
    config.comparators.steps = 20
    return config


def make_run(workdir, **flags):
    """Returns a run of it."""
    config = get_config()
    config.validate()
    speed = run_lib.Speed(**flags)
    return run_lib.Run(config=config, workdir=storage.open_workdir(workdir, config), speed=speed)


def run_all(run):
    """Runs every stage, and returns what the last one prints."""
    return [stage(run) for stage in stages.STAGES.values()][-1]
