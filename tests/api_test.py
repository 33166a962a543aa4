"""What every public function promises: a docstring, and numbers by keyword."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import occjax

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(occjax.__path__, 'occjax.')
]
FUNCTIONS = [
    pytest.param(function, id=f'{module.__name__}.{name}')
    for module in MODULES
    for name, function in vars(module).items()
    if inspect.isroutine(inspect.unwrap(function))
    and getattr(function, '__module__', '') == module.__name__
    and not name.startswith('_')
]

WINDOWS = 'size, stride, fill, grid, chunk_size, progress'
IMAGES, LOSS = 'logits_fn, images, labels', 'loss_fn, bounds'
EXPLAINED, FILL = 'logits_fn, images, classes', 'fill, chunk_size, progress'
# Other programs call these by name.
CONTRACTS = {
    'fgsm': f'({IMAGES}, *, epsilon, {LOSS})',
    'attack.targeted_fgsm': f'(logits_fn, images, targets, *, epsilon, {LOSS})',
    'attack.fgsm_l2': f'({IMAGES}, *, epsilon, {LOSS})',
    'attack.bim': f'({IMAGES}, *, epsilon, steps, step_size, {LOSS})',
    'attack.pgd': f'({IMAGES}, *, key, epsilon, steps, step_size, {LOSS})',
    'attack.pgd_l2': f'({IMAGES}, *, key, epsilon, steps, step_size, {LOSS})',
    'attack.mi_fgsm': f'({IMAGES}, *, epsilon, steps, step_size, decay, {LOSS})',
    'attack.apgd': f'({IMAGES}, *, key, epsilon, steps, {LOSS})',
    'attack.square': f'({IMAGES}, *, key, epsilon, steps, bounds)',
    'attack.deepfool': f'({IMAGES}, *, steps, overshoot, candidates, bounds)',
    'attack.minimal_epsilon': f'(attack_fn, {IMAGES}, *, most, halvings)',
    'grid_shape': '(image_shape, *, size, stride, grid)',
    'occluded_logits': f'(logits_fn, images, *, {WINDOWS}, engine, threshold, every)',
    'heatmaps': f'(logits_fn, images, classes, *, {WINDOWS}, engine, threshold, every)',
    'occlusion.heatmaps': f'(logits_fn, images, classes, *, {WINDOWS})',
    'incremental.heatmaps': f'(logits_fn, images, classes, *, {WINDOWS}, threshold, every)',
    'incremental.occluded_logits': f'(logits_fn, images, *, {WINDOWS}, threshold, every)',
    'attribution.rise': f'({EXPLAINED}, *, key, masks, cells, keep, {FILL})',
    'attribution.deletion': f'({EXPLAINED}, saliency, *, steps, {FILL})',
    'attribution.insertion': f'({EXPLAINED}, saliency, *, steps, {FILL})',
    'accelerate': '(fn)',
    'vgg.init': '(key, *, image_size, num_classes, hidden, plan, channels, levels, mean, std)',
    'vgg.logits': '(variables, images, *, plan)',
    'vgg.train_logits': '(variables, images, *, key, dropout_rate, plan)',
    'vgg.summary': '(*, image_size, num_classes, hidden, plan, levels)',
    'vgg.from_torchvision': '(state_dict, *, mean, std)',
    'detector.init_bank': '(key, *, num_classes, grid, features, convolutions, standardize)',
    'detector.score': '(bank, maps, predicted)',
}


def bare(signature):
    """Returns a signature's names alone."""
    parameters = [
        parameter.replace(annotation=parameter.empty, default=parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize('name', CONTRACTS)
def test_contract(name):
    function = occjax
    for part in name.split('.'):
        function = getattr(function, part)
    assert bare(inspect.signature(function)) == CONTRACTS[name]


@pytest.mark.parametrize('function', FUNCTIONS)
def test_has_a_docstring(function):
    assert inspect.getdoc(function)


@pytest.mark.parametrize('module', MODULES, ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0
    assert module.__doc__


def test_the_api_is_what_editors_see_and_what_is_there():
    """Checkers read the imports that never run; people get the same names on first use."""
    tree = ast.parse(pathlib.Path(occjax.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [alias.name for node in checked.body for alias in node.names]
    assert sorted(seen) == occjax.__all__
    for name in occjax.__all__:
        assert hasattr(occjax, name)
    assert set(occjax.__all__) <= set(dir(occjax))
    assert (pathlib.Path(occjax.__file__).parent / 'py.typed').exists()
