"""What things are called on the command line, in configs and in results; imports nothing.

Modules that take seconds to import build their tables from these.
"""

STAGES = ('train', 'heatmaps', 'detectors', 'report')
MODES = (*STAGES, 'all', 'detect', 'sweep', 'adaptive', 'benchmark', 'fidelity')
ENGINES = ('full', 'incremental', 'approximate')
PEERS = ('captum', 'captum-compiled')

PLANS = ('vgg11', 'vgg13', 'vgg16', 'vgg19')
GRIDS = ('paper', 'floor', 'cover')
SPLITS = ('train', 'test')
PROTOCOLS = ('paper', 'held_out')
BALANCES = ('undersample', 'weights', 'none')

# Attacks of `--mode=sweep` beside FGSM, and those of `--mode=adaptive`, which know the detector.
ATTACKS = (
    'targeted_fgsm',
    'bim',
    'pgd',
    'mi_fgsm',
    'square',
    'pgd_l2',
    'apgd',
    'carlini_wagner',
    'deepfool',
)
NEAREST = ('carlini_wagner', 'deepfool')  # Without a ball: they go as far as it takes.
JOINT_ATTACKS = ('joint', 'selective', 'orthogonal')

# Banks of networks, by what they see; the first is the paper's.
METHODS = (
    'detector',
    'pooled',
    'linear_probe',
    'relative_map',
    'shuffled_cells',
    'log_map',
    'unoccluded_logits',
    'all_logits',
    'logit_differences',
    'conv_logits',
)

# The same of a sweep's, which stores other views beside the windows; and other people's.
VIEWING = ('all_views', 'views_alone')
RIVALS = ('input_mfs', 'multi_lid', 'sid')
TWINNED = ('sid', 'pid')  # What asks a second classifier; the latter is a score and no network.

# What `--mode=sweep` may show detectors beside the windows, see `views`; the first is MagNet's.
VIEWS = (
    'reconstruction',
    'shift',
    'shift_back',
    'flip',
    'blur',
    'blur_more',
    'sharpen',
    'shrink',
    'median',
    'bits',
    'grey',
    'noise',
    'noise_more',
)

# Scores of detectors that need no heatmap, see `comparators`.
COMPARATORS = ('feature_squeezing', 'magnet_error', 'magnet_divergence')

# What neither fits detectors nor is judged in their tables, though detectors meet it in use: the
# image under noise of the attack's size, still classified correctly; an image that is classified
# wrong without an attack; an attack that changed nothing.
CONTROLS = ('noise', 'misclassified', 'failed')
