"""Tests what is read from programs that a device's compiler made."""

import importlib.util
import re

import pytest

from occjax.benchmark import compilers, peer
from occjax.report import benchmark as benchmark_report
from occjax.types import UsageError
from tests.small_run import make_run

_TOLD = r', metadata={op_name="jit(f)/\1"}, backend_config={"estimated_cycles":"\2"}'
PROGRAM = re.sub(
    r' @(\w*) (\d+)',
    _TOLD,
    """
HloModule jit_f, is_scheduled=true

%bound.1 (p.1: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%small.1 (p.2: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8] add(%p.2, %p.2) @add 3
}

%large.1 (p.3: f32[8]) -> f32[8] {
  ROOT %mul.1 = f32[8] multiply(%p.3, %p.3) @mul 5
}

%inner.1 (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a.1 = f32[8] fusion(%x), kind=kLoop, calls=%small.1 @exp 11
  %b.1 = f32[8] conditional(%which, %a.1, %a.1), branch_computations={%small.1, %large.1}
}

%outer.1 (p.5: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w.1 = (s32[], f32[8]) while(%t), condition=%bound.1, body=%inner.1
  %c.1 = f32[8] call(%x), to_apply=%small.1
}

ENTRY %main.1 (x.1: f32[8]) -> f32[8] {
  %w.2 = (s32[], f32[8]) while(%t), condition=%bound.1, body=%outer.1
  ROOT %d.1 = f32[8] fusion(%x), kind=kLoop, calls=%small.1 @unnamed 2
}
""",
)


def test_cycles_count_loops_by_their_trips_and_the_longest_branch():
    cycles = compilers.estimated_cycles(PROGRAM)
    assert cycles == {'exp': 7 * 7 * 11, 'mul': 7 * 7 * 5, 'add': 7 * 3, 'unnamed': 2}


@pytest.mark.parametrize('name', ['tpu', 'gpu:h200', 'v5e:2x2', 'tpu:v9z:2x2'])
def test_an_unknown_target_is_told_what_there_is(name):
    with pytest.raises(
        UsageError, match='--benchmark_target=.*(expected tpu:<topology>|-compiler)'
    ):
        compilers.target(name)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='no libtpu')
@pytest.mark.slow
def test_a_tpus_compiler_predicts_every_program(tmp_path, small_plan):
    run = make_run(tmp_path / 'run')
    table = compilers.benchmark(run, peer.Timing(images=2, target='tpu:v5e:2x2'))
    for name in ('training step', 'FGSM', 'maps, full', 'maps, incremental', 'verdict'):
        assert name in table


def test_the_table_has_a_row_per_program_and_says_that_it_is_a_prediction():
    programs = {
        name: {
            'count': 8,
            'unit': 'images',
            'temporary_bytes': 3 << 20,
            'argument_bytes': 0,
            'collectives': {'all-reduce': 2_000_000},
            'cycles': 10_000,
            'per_second': 1234.5,
            'share_of_cycles': {'conv': 0.75, 'add': 0.25},
        }
        for name in ('FGSM', 'verdict')
    }
    result = {'network': 'vgg11', 'image_size': 32, 'size': 15, 'stride': 5, 'precision': 'float32'}
    result |= {'images_per_device': 8, 'devices': 4, 'device': 'TPU', 'versions': {'jax': '1'}}
    lines = benchmark_report.compiled_table(result | {'programs': programs}).splitlines()
    assert ' '.join(lines[3].split()) == 'FGSM 3 0 2.0 10,000 1,234 images conv 75%, add 25%'
    assert lines[4].startswith('verdict ')
    assert 'Predicted by the compiler' in lines[-1]
