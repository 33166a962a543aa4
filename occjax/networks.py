"""A classifier as the program takes it: a pure function and its weights, ours or one's own.

Dimensions: B batch, H W C image, K classes.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occjax import convolution, resnet, vgg
from occjax.types import Array, LogitsFn, UsageError

TORCHVISION = (*(f'{name}_bn' for name in vgg.PLANS), 'resnet18', 'resnet34', 'resnet50')


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A function `(variables, images) -> logits`; one object is one network to `jax.jit`."""

    fn: Callable[[Any, Array], Array]
    features_fn: Callable[[Any, Array], Array] | None = None  # what logits are made from, if known

    def classifier(self, variables: Any) -> LogitsFn:
        """Returns the classifier with its weights, in the forms that run best."""
        return convolution.accelerate(functools.partial(self.fn, variables))

    def features(self, variables: Any) -> Callable[[Array], Array]:
        """Returns what gives the last features, or the logits where they aren't known."""
        return convolution.accelerate(functools.partial(self.features_fn or self.fn, variables))


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A network that is trained already."""

    network: Network
    variables: Any
    class_names: tuple[str, ...] | None  # None: those of the images that it is given
    image_size: int | None  # None: any
    digest: str  # of weights and code


@functools.cache
def of_plan(plan: vgg.Plan) -> Network:
    """Returns a VGG of ours."""
    return Network(*(functools.partial(fn, plan=plan) for fn in (vgg.logits, vgg.features)))


def load(source: str, config: Any = None) -> Trained:
    """Returns a trained network.

    Args:
        source: `'<file.py>:<function>'`, whose function returns `(fn, variables, class names, image
            size)`, of the config if it has an argument; or `'torchvision:<name>:<file>'` with a
            `.safetensors` or `.npz` file of the state dict. If beside that is `<file>.txt`, it has
            the classes' names, one per line.
        config: of the experiment.

    Raises:
        UsageError: if there is no such file or function, or it holds something else.
    """
    kind, *rest = source.split(':')
    file = pathlib.Path(rest[-1] if kind == 'torchvision' else ':'.join([kind, *rest[:-1]]))
    if not rest or (kind == 'torchvision' and len(rest) != 2):
        raise UsageError(
            f"config.classifier.source is {source!r}: expected 'vgg', '<file.py>:<function>' or "
            "'torchvision:<name>:<file.safetensors or .npz>'."
        )
    if not file.is_file():
        raise UsageError(f'config.classifier.source is {source!r}: there is no file {file}.')
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    if kind == 'torchvision':
        return _torchvision(rest[0], file, content)
    return _own(file, rest[-1], content, config)


def _torchvision(name, file, digest):
    if name not in TORCHVISION:
        raise UsageError(
            f'config.classifier.source names {name!r}: expected one of {", ".join(TORCHVISION)}.'
        )
    state = _arrays(file)
    try:
        if name.startswith('vgg'):
            plan = vgg.PLANS[name.removesuffix('_bn')]
            network, variables = of_plan(plan), vgg.from_torchvision(state)
            if (actual := vgg.torchvision_plan(state)) != plan:
                raise ValueError(f'Its plan is {plan}, theirs {actual}.')
        else:
            network, variables = _resnet(), resnet.from_torchvision(state)
            found = resnet.depth(variables)
            if name != f'resnet{found}':
                raise ValueError(f'They are those of a ResNet of {found} layers.')
    except ValueError as error:
        raise UsageError(f'{file} does not hold weights of {name}: {error}') from None
    names = file.with_suffix('.txt')
    class_names = tuple(names.read_text().splitlines()) if names.is_file() else None
    return Trained(network, variables, class_names, None, digest)


@functools.cache
def _resnet():
    return Network(resnet.logits)


def _arrays(file):
    """Returns a file's arrays by name. Nothing in it is executed, which pickles would be."""
    if file.suffix == '.npz':

        def load_file(file):
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)

    elif file.suffix == '.safetensors':
        try:
            from safetensors.numpy import load_file
        except ImportError:
            raise UsageError(f'{file} needs safetensors: pip install safetensors.') from None
    else:
        raise UsageError(
            f'{file}: expected .safetensors or .npz. Of a state dict of PyTorch the former is made '
            'by safetensors.torch.save_file(state_dict, file), so that nothing is unpickled here.'
        )
    try:
        return load_file(file)
    except Exception as error:  # Of NumPy, of zipfile, and of safetensors' own, in Rust.
        raise UsageError(f'{file} is no such file, or damaged: {error}') from None


def _is_beside(module, folder, top):
    """Returns whether a module is `<top>.py` or of `<top>/` there; `.venv/` there is not."""
    path = pathlib.Path(getattr(module, '__file__', None) or '/')
    return path == folder / f'{top}.py' or folder / top in path.parents


def _own(file, function, digest, config):
    where = f'config.classifier.source is {str(file)!r}:{function!r}'
    name = 'occjax_source_' + re.sub(r'\W', '_', file.stem)  # No module's that is imported.
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise UsageError(f'{where}: expected a Python file.')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Where dataclasses look their module up.
    folder, before = file.resolve().parent, set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UsageError(f'{where}: the file has no such function.')
        make_fn = getattr(module, function)
        found = make_fn(config) if inspect.signature(make_fn).parameters else make_fn()
    except ImportError as error:
        raise UsageError(f'{where}: {error}. Install it, or put it beside the file.') from None
    finally:
        sys.path.remove(str(folder))
        # Modules beside the file leave, so that another folder's of the same name are others.
        helpers = {
            name: pathlib.Path(sys.modules.pop(name).__file__)
            for name, helper in sorted(sys.modules.items())
            if (top := name.partition('.')[0]) not in before and _is_beside(helper, folder, top)
        }
    if not (isinstance(found, tuple) and len(found) == 4 and callable(found[0])):
        raise UsageError(
            f'{where}: expected it to return (fn, variables, class names, image size), with '
            'fn(variables, images) -> logits.'
        )
    fn, variables, class_names, image_size = found
    # What it computes is its weights and all of its code, byte by byte: logits of an image would
    # move with the device's last bits, and miss what that image does not reach.
    total = hashlib.sha256(digest.encode())
    for name, path in helpers.items():
        total.update(f'{name} {hashlib.sha256(path.read_bytes()).hexdigest()}'.encode())
    for leaf in jax.tree.leaves(variables):
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        total.update(np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf))
    class_names = class_names and tuple(class_names)
    return Trained(Network(fn), variables, class_names, image_size, total.hexdigest())
