import html.parser
import io
import json
import math
import pathlib
import re
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from matplotlib import image as matplotlib_image
from matplotlib.colors import to_rgb

from occjax import config as config_lib
from occjax import occlusion, vgg
from occjax.report import canvas, figures, page, paper, tables
from occjax.types import HeatmapSet

NAMES = ('Ant', 'Bee <b>&"|', 'Cow')
COUNTS = ('n_correct', 'n_adversarial', 'n_thresholds')
METRICS = (
    'accuracy',
    'majority_baseline',
    'balanced_accuracy',
    'auroc',
    'auroc_with_noise',
    'tpr_at_5_fpr',
    'tpr_at_1_fpr',
    'fpr_at_5_fpr',
)
FILES = sorted(
    [
        *(f'{name}.png' for name in ('classes', 'fig1', 'fig2', 'fig3', 'roc', 'scores')),
        *('report.html', 'results.json', 'summary.json', 'tables.md'),
    ]
)
VOID = {'meta', 'img', 'br', 'link', 'hr'}


def make_config(side=12, size=4, stride=3, fill=(0.5,), grid='floor'):
    return config_lib.Config(
        data=config_lib.Data(name='toy', image_size=side),
        classifier=config_lib.Classifier(epochs=1, learning_rate=1e-3),
        attack=config_lib.Attack(epsilon=0.03),
        occlusion=config_lib.Occlusion(size=size, stride=stride, fill=fill, grid=grid),
    )


def make_results(class_names=NAMES, nothing=False):
    """Numbers that are all different, so that a swapped column shows; or as few as may be."""
    rng = np.random.default_rng(0)
    theirs = paper.numbers(class_names)

    def entry(with_paper=None):
        counts = {key: int(rng.integers(1000, 9999)) for key in COUNTS}
        rates = {key: None if nothing else float(rng.random()) for key in METRICS}
        note = {'note': 'no adversarial maps'} if nothing else {}
        return counts | rates | with_paper | note if with_paper is not None else counts | rates

    def detection():
        return {
            'per_class': {
                name: entry({'paper_accuracy': theirs and theirs.accuracy[name]})
                for name in class_names
            },
            'overall': entry({'paper_accuracy': theirs and theirs.overall})
            | {'over_classes': entry()},
            'baselines': {
                method: entry()
                | {'over_classes': entry(), 'per_class': {name: entry() for name in class_names}}
                for method in ('max_probability', 'map_mean')
            },
        }

    return {
        'manifest': {
            'config_hash': 'abc',
            'versions': {'jax': '1.2.3'},
            'device': 'an abacus',
            'dataset': {'name': 'toy', 'train_images': 2345, 'test_images': 678},
        },
        'classifier': {
            'train_accuracy': 0.9124,
            'test_accuracy': 0.8013,
            'paper_test_accuracy': theirs and theirs.test_accuracy,
        },
        'attack': {
            'epsilon': 0.03,
            'attempted': 1234,
            'successful': 567,
            'success_rate': None if nothing else 567 / 1234,
            'max_perturbation': 0.0299,
            'unmoved': 17,
            'min_pixel': 0.004,
            'max_pixel': 0.996,
        },
        'heatmaps': {
            name: {
                'correct': int(rng.integers(1000, 9999)),
                'adversarial': int(rng.integers(1000, 9999)),
                'paper_correct': theirs and theirs.counts[name][0],
                'paper_adversarial': theirs and theirs.counts[name][1],
            }
            for name in class_names
        },
        'map_mean': None if nothing else {'correct': 0.7654, 'adversarial': 0.3456},
        'detection': {'paper': detection(), 'held_out': detection()},
    }


def make_maps(count, *, grid=(3, 3), classes=3, is_adversarial=None):
    rng = np.random.default_rng(1)
    labels = np.arange(count, dtype=np.int32) % classes
    if is_adversarial is None:
        is_adversarial = np.arange(count) % 5 < 2
    return HeatmapSet(
        logits=rng.normal(size=(count, *grid, classes)).astype(np.float32),
        unoccluded=np.eye(classes, dtype=np.float32)[labels],
        label=labels,
        image_id=np.arange(count, dtype=np.int32),
        is_adversarial=np.broadcast_to(is_adversarial, count),
    )


def make_example(*, grid=(3, 3), channels=3, predicted=1):
    rng = np.random.default_rng(2)
    clean, adversarial = rng.random((2, 12, 12, channels), np.float32)
    clean_map, adversarial_map = rng.random((2, *grid), np.float32)
    return figures.Example(clean, adversarial, 0, predicted, clean_map, adversarial_map)


def write(directory, results=None, *, class_names=NAMES, examples=None, maps=None, config=None):
    files = page.build(
        results or make_results(class_names),
        rows=vgg.summary(image_size=32, hidden=64, num_classes=3),
        class_names=class_names,
        examples=[make_example()] if examples is None else examples,
        maps=make_maps(24, classes=len(class_names)) if maps is None else maps,
        config=config or make_config(),
    )
    pathlib.Path(directory).mkdir(exist_ok=True)
    for name, content in files.items():
        pathlib.Path(directory, name).write_bytes(content)


def parse_markdown(text):
    """Returns {title: rows of cells}, header first, without bold and escapes."""
    tables = {}
    for section in re.split(r'^## ', text, flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        lines = [line for line in lines if line.startswith('|')]
        cells = [re.split(r'(?<!\\)\|', line)[1:-1] for line in lines]
        plain = [[re.sub(r'\*\*|\\', '', cell).strip() for cell in row] for row in cells]
        tables[title] = [plain[0], *plain[2:]] if plain else []
    return tables


class Parser(html.parser.HTMLParser):
    """Notes cells, sources and whether every element that opens also closes."""

    def __init__(self):
        super().__init__()
        self.open, self.resources, self.cells, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.resources += [value for name, value in attrs if name in ('src', 'href', 'srcset')]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ('td', 'th'):
            self.cells.append('')

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-1:]}'
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th'):
            self.cells[-1] += data


def heatmap_images(figure):
    """Returns the drawn images that are heatmaps: single channel, in colour."""
    drawn = [image for axes in figure.axes for image in axes.get_images()]
    return [image for image in drawn if image.get_array().ndim == 2 and image.cmap.name != 'gray']


class PaperTest(parameterized.TestCase):
    @parameterized.parameters(
        (paper.CIFAR10, 43_298, 37_836, 0.866, 0.874),
        (paper.IMAGENETTE, 11_102, 9_039, 0.896, 0.814),
    )
    def test_sums_give_the_implied_rates(self, theirs, correct, adversarial, trained, fooled):
        self.assertEqual((theirs.correct, theirs.adversarial), (correct, adversarial))
        self.assertAlmostEqual(theirs.train_accuracy, trained, delta=5e-4)
        self.assertAlmostEqual(theirs.attack_success, fooled, delta=5e-4)

    @parameterized.parameters(paper.CIFAR10, paper.IMAGENETTE)
    def test_overall_is_the_class_mean(self, *theirs):
        theirs = paper.Paper(*theirs)
        self.assertEqual(list(theirs.accuracy), list(theirs.counts))
        mean = math.fsum(theirs.accuracy.values()) / len(theirs.accuracy)
        self.assertEqual(round(mean, 2), theirs.overall)

    def test_parameters_are_those_of_table_1(self):
        rows = vgg.summary(image_size=224)
        self.assertEqual(sum(row.parameters for row in rows), paper.PARAMETERS)

    def test_lookup_by_class_names(self):
        self.assertIs(paper.numbers(tuple(paper.CIFAR10.counts)), paper.CIFAR10)
        self.assertIs(paper.numbers(sorted(paper.IMAGENETTE.counts)), paper.IMAGENETTE)
        self.assertIsNone(paper.numbers(NAMES))
        self.assertIsNone(paper.numbers(tuple(paper.CIFAR10.counts)[:9]))


class TablesTest(parameterized.TestCase):
    @parameterized.parameters(
        (NAMES, 'Tables II/III', 'Tables IV/V'),
        (tuple(paper.IMAGENETTE.counts), 'Table II', 'Table V'),
        (tuple(paper.CIFAR10.counts), 'Table III', 'Table IV'),
    )
    def test_every_number_is_where_its_header_says(self, class_names, counts_name, accuracy_name):
        results, theirs = make_results(class_names), paper.numbers(class_names)
        rows = vgg.summary(image_size=32, hidden=64)
        parsed = parse_markdown(tables.to_markdown(tables.build(results, rows, class_names)))

        def decimals(values, places=3):
            return ['–' if value is None else f'{value:.{places}f}' for value in values]

        outcome = {label: cells for label, *cells in parsed.pop('Classifier and attack')}
        stated = decimals([theirs and theirs.test_accuracy], 2)
        self.assertEqual(outcome['Test accuracy'], ['0.801', *stated])
        implied = decimals([theirs and theirs.train_accuracy, theirs and theirs.attack_success])
        self.assertEqual(outcome['Training accuracy'], ['0.912', implied[0]])
        self.assertEqual(outcome['Attack success rate'], ['0.459', implied[1]])
        self.assertEqual(outcome['Images attacked'][0], '1,234')
        self.assertEqual(outcome['Successful attacks'][0], '567')
        self.assertEqual(outcome['ε of FGSM'][0], '0.03')
        self.assertEqual(outcome['Largest change of a pixel'][0], '0.030')
        self.assertEqual(outcome['Range of attacked pixels'][0], '0.004 to 0.996')
        self.assertEqual(outcome['Attacked images that did not move'][0], '17')
        self.assertEqual(outcome['Mean of correct maps'][0], '0.765')
        self.assertEqual(outcome['Mean of adversarial maps'][0], '0.346')

        layers = [[r.layer, str(list(r.output_shape)), f'{r.parameters:,}'] for r in rows]
        total = f'{sum(row.parameters for row in rows):,}'
        table = parsed.pop('Table I. The classifier')
        self.assertEqual(table[1:], [*layers, ['Total', '', total]])

        _, *lines = parsed.pop(f'{counts_name}. Heatmaps of training images')
        counts = [list(results['heatmaps'][name].values()) for name in class_names]
        counts.append(
            [None if None in column else sum(column) for column in zip(*counts, strict=True)]
        )
        wanted = [['–' if n is None else f'{n:,}' for n in row] for row in counts]
        names = [*class_names, 'Sum']
        self.assertEqual(lines, [[a, *b] for a, b in zip(names, wanted, strict=True)])

        for protocol, detection in results['detection'].items():
            baselines = detection['baselines'].values()
            _, *lines = parsed.pop(
                f'{accuracy_name}. Detection by predicted class, protocol {tables.words(protocol)}'
            )
            entries = [detection['per_class'][name] for name in class_names]
            rivals = [[b['per_class'][name] for b in baselines] for name in class_names]
            names = [*class_names, 'Over classes', 'Over all maps']
            for average in ('over_classes', ''):
                entries.append(tables.averaged(detection['overall'], average))
                rivals.append([tables.averaged(each, average) for each in baselines])
            for line, name, entry, others in zip(lines, names, entries, rivals, strict=True):
                wanted = [name, *(f'{entry[key]:,}' for key in COUNTS)]
                wanted += decimals(entry[key] for key in METRICS)
                wanted += decimals([entry['paper_accuracy']], 2)
                wanted += decimals(o[key] for o in others for key in ('balanced_accuracy', 'auroc'))
                self.assertEqual(line, wanted)

        self.assertEmpty(
            parsed.pop('What the detectors do not do: stop an attacker who knows them')
        )
        ((title, (_, *lines)),) = parsed.items()
        self.assertStartsWith(title, 'Table VI')
        for protocol, detection in results['detection'].items():
            methods = {"Paper's detector": detection['overall']}
            methods |= {
                'Unoccluded probability': detection['baselines']['max_probability'],
                'Mean of the map': detection['baselines']['map_mean'],
            }
            for method, entry in methods.items():
                means = {'over all maps': entry, 'over classes': entry['over_classes']}
                for label, mean in means.items():
                    # The paper's is a mean over classes.
                    theirs_of = entry.get('paper_accuracy') if label == 'over classes' else None
                    n = [f'{mean[key]:,}' for key in COUNTS]
                    wanted = [tables.words(protocol), method, label, *n]
                    wanted += [*decimals(mean[key] for key in METRICS), *decimals([theirs_of], 2)]
                    self.assertEqual(lines.pop(0), wanted)
        self.assertEmpty(lines)

    def test_header_widths_fit_rows(self):
        for table in tables.build(make_results(), vgg.summary(image_size=32), NAMES):
            for row in [*table.rows, *([table.total] if table.total else [])]:
                self.assertLen(row, len(table.header), table.title)

    def test_class_without_adversarial_maps_says_so(self):
        text = tables.to_markdown(tables.build(make_results(nothing=True), [], NAMES))
        self.assertIn('Ant (no adversarial maps)', text)


class WriteTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), 'report')

    def read(self, name):
        return (self.directory / name).read_text(encoding='utf-8')

    def test_writes_these_files_and_no_others(self):
        write(self.directory)
        write(self.directory)
        self.assertEqual(sorted(path.name for path in self.directory.iterdir()), FILES)

    def test_results_come_back_unchanged(self):
        results = make_results()
        write(self.directory, results)
        self.assertEqual(json.loads(self.read('results.json')), results)

    def test_not_a_number_is_refused_before_anything_is_written(self):
        results = make_results()
        results['detection']['paper']['overall']['auroc'] = math.nan
        with self.assertRaises(ValueError):
            write(self.directory, results)
        self.assertEmpty(list(self.directory.glob('*')))

    def test_missing_values_print_as_dashes(self):
        write(self.directory, make_results(nothing=True))
        parsed = parse_markdown(self.read('tables.md'))
        for title, rows in parsed.items():
            for row in rows[1:]:
                if title.startswith(('Tables IV/V', 'Table VI')):
                    words = 3 if title.startswith('Table VI') else 1
                    self.assertEqual(set(row[words + len(COUNTS) :]), {'–'}, title)
        for name in ('tables.md', 'report.html', 'results.json'):
            text = re.sub(r'data:image/png;base64,[^"]*|list-style: none', '', self.read(name))
            self.assertNotRegex(text, r'(?i)\b(nan|none|inf)\b')

    def test_header_names_the_experiment(self):
        write(self.directory)
        for name in ('tables.md', 'report.html'):
            for fact in ('toy', config_lib.digest(make_config()), '2,345', '678', 'an abacus'):
                self.assertIn(fact, self.read(name))
            for share in ('80%', '50%'):
                self.assertIn(share, self.read(name))

    def test_the_page_opens_with_what_was_found(self):
        results = make_results(tuple(paper.CIFAR10.counts))
        held_out = results['detection']['held_out']
        held_out['overall'] |= {
            'n_correct': 1200,
            'n_adversarial': 345,
            'balanced_accuracy': 0.612,
            'auroc': 0.111,
            'auroc_with_noise': 0.654,
            'interval': {'balanced_accuracy': (0.6, 0.624), 'auroc_with_noise': (0.6, 0.708)},
            'over': {'auroc_with_noise': [9, 345]},
            'controls': {'noise': {'n': 98, 'flagged': 0.5, 'flagged_at_5_fpr': 0.25}},
        }
        held_out['overall']['over_classes'] |= {'balanced_accuracy': 0.701}
        # Nearly perfect against clean images, and it flags noise: not the best.
        held_out['baselines']['max_probability'] |= {'auroc': 0.999, 'auroc_with_noise': 0.321}
        held_out['baselines']['map_mean'] |= {'auroc': 0.5, 'auroc_with_noise': 0.987}
        for kind in ('correct', 'adversarial'):
            for entry in results['heatmaps'].values():
                entry[kind] = 10 if kind == 'correct' else 20
        results['map_mean'] |= {'difference': -0.4198, 'interval': {'difference': [-0.43, -0.4096]}}
        names = tuple(paper.CIFAR10.counts)
        write(self.directory, results, class_names=names)
        lines = self.read('tables.md').splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith('- '))
        self.assertEqual(
            lines[start], '- **0.801** of 678 test images are classified correctly (paper: 0.78).'
        )
        for number, words in [
            ('0.459', 'of 1,234 correctly classified training images'),
            ('0.459', 'ε = 0.03 (paper: 0.874)'),
            ('0.612 ± 0.012', 'over 345 attacked and 1,200 clean test images'),
            ('0.612 ± 0.012', 'an AUROC of 0.654 ± 0.054 (9 of 345) against clean and noisy ones'),
            ('0.612 ± 0.012', 'over classes is 0.701 (paper: 0.64)'),
            ('0.321', 'cannot be told'),
            ('0.987', 'of all that was tried, on the same images: Mean of the map'),
            ('0.250', 'of 98 noisy images are flagged'),
            ('0.250', 'at thresholds at which 0.05 of clean images are flagged.'),
            ('0.346', 'of 200 adversarial maps, 0.765 of 100 correct ones: they are darker'),
            ('0.346', '(the difference is −0.420 ± 0.010)'),
        ]:
            (line,) = (line for line in lines[start : start + 7] if f'**{number}**' in line)
            self.assertIn(words, line)
            self.assertIn(f'<b>{number}</b>', self.read('report.html'))

    @parameterized.parameters(
        ((-0.3, -0.1), 'they are darker (the difference is −0.200 ± 0.100)'),
        ((0.1, 0.3), 'they are brighter (the difference is 0.200 ± 0.100)'),
        ((-0.3, 0.1), 'they are not shown to be darker (the difference is −0.100 ± 0.200)'),
        (None, 'whether they are darker cannot be told'),
    )
    def test_darker_is_said_only_where_the_difference_is_sure(self, ends, said):
        results = make_results()
        results['map_mean'] |= {
            'difference': ends and sum(ends) / 2,
            'interval': {'difference': ends},
        }
        write(self.directory, results)
        self.assertIn(said, self.read('tables.md'))

    @parameterized.parameters(
        ((0.02, 0.04), 'the maps add to it (the difference is 0.030 ± 0.010)'),
        ((-0.04, -0.02), "the paper's detectors do worse (the difference is −0.030 ± 0.010)"),
        ((-0.01, 0.03), 'the maps are not shown to add to it (the difference is 0.010 ± 0.020)'),
        (None, 'cannot be told'),
    )
    def test_more_than_confidence_is_said_only_where_the_lead_is_sure(self, ends, said):
        results = make_results()
        held_out = results['detection']['held_out']
        key = 'auroc_with_noise'
        lead = {key: ends and sum(ends) / 2, 'interval': {key: ends}}
        held_out['overall'] |= {'over_confidence': lead}
        write(self.directory, results)
        self.assertIn(said, self.read('tables.md'))

    def test_agreement_with_the_paper_s_classes_is_said(self):
        results = make_results()
        agreement = {'rho': 0.314, 'interval': [-0.4, 0.8], 'n': 9}
        results['detection']['held_out']['overall'] |= {'rank_agreement': agreement}
        write(self.directory, results)
        self.assertIn("**0.314** is Spearman's correlation of 9 classes", self.read('tables.md'))
        self.assertIn('(95 %: −0.400 to 0.800)', self.read('tables.md'))

    def test_of_many_classes_those_with_most_maps_have_bars(self):
        """And the picture says so; one of a thousand classes would be as high as a house."""
        names = [f'class {k}' for k in range(90)]
        results = make_results(names)
        detection = results['detection']['held_out']
        for k, name in enumerate(names):
            detection['per_class'][name] |= {'n_correct': 10 + k % 3, 'n_adversarial': k // 45}
        kept = page._with_bars(detection, names)
        self.assertLen(kept, 40)
        self.assertEqual(kept, sorted(kept, key=names.index))
        counts = {n: e['n_correct'] + e['n_adversarial'] for n, e in detection['per_class'].items()}
        least = min(counts[name] for name in kept)
        self.assertGreaterEqual(least, max(counts[n] for n in names if n not in kept))
        self.assertEqual(page._with_bars(detection, names[:40]), names[:40])
        for name in kept[:5]:
            detection['per_class'][name]['balanced_accuracy'] = None
        self.assertNoCommonElements(kept[:5], page._with_bars(detection, names))
        with tempfile.TemporaryDirectory() as directory:
            write(directory, results, class_names=names)
            text = pathlib.Path(directory, 'report.html').read_text()
            picture = matplotlib_image.imread(pathlib.Path(directory, 'classes.png'))
        self.assertIn('Of 90 classes the 40 with most maps.', text)
        self.assertLess(picture.shape[0], 2500)

    def test_a_screen_has_the_first_rows_of_long_tables(self):
        (table,) = [t for t in tables.build(make_results(), [], NAMES) if 'Heatmaps' in t.title]
        self.assertEqual(tables.shorten(table), table)
        self.assertEqual(tables.shorten(table, most=3), table)
        short = tables.shorten(table, most=1)
        self.assertEqual(short.rows[0], table.rows[0])
        self.assertEqual(short.rows[1], ('… and 2 more in tables.md', '', '', '', ''))
        self.assertEqual(short.total, table.total)

    def test_long_tables_are_folded(self):
        write(self.directory)
        page = self.read('report.html')
        self.assertIn('<details><summary>Table I. The classifier', page)
        self.assertIn('<h3>Table VI. Overall', page)

    def test_page_is_whole_and_fetches_nothing(self):
        write(self.directory)
        page, parser = self.read('report.html'), Parser()
        parser.feed(page)
        parser.close()
        self.assertEmpty(parser.open)
        self.assertLen(parser.resources, 6)
        for resource in parser.resources:
            self.assertStartsWith(resource, 'data:image/png;base64,')
        self.assertNotRegex(page, r'https?:|url\(|@import')
        self.assertNoCommonElements(parser.tags, ['script', 'link', 'iframe', 'b>&"|'])

    def test_page_has_the_cells_of_every_table(self):
        write(self.directory)
        parser = Parser()
        parser.feed(self.read('report.html'))
        cells = [
            ' '.join(cell.split())
            for rows in parse_markdown(self.read('tables.md')).values()
            for row in rows
            for cell in row
        ]
        self.assertEqual(parser.cells[: len(cells)], cells)
        self.assertIn('versions.jax', parser.cells)

    @parameterized.named_parameters(
        ('plain', {}),
        ('no_example', {'examples': []}),
        ('failed_attack', {'examples': [make_example(predicted=0)]}),
        ('many_examples', {'examples': [make_example() for _ in range(7)]}),
        ('no_adversarial_map', {'maps': make_maps(30, is_adversarial=False)}),
        ('no_correct_map', {'maps': make_maps(30, is_adversarial=True)}),
        ('no_map', {'maps': make_maps(0)}),
        ('few_maps', {'maps': make_maps(4)}),
        (
            'one_cell_one_channel',
            {
                'maps': make_maps(30, grid=(1, 1)),
                'examples': [make_example(grid=(1, 1), channels=1)],
                'config': make_config(size=12),
            },
        ),
        ('mean_fill', {'config': make_config(fill=())}),
        ('colour_fill', {'config': make_config(fill=(0.1, 0.2, 0.3))}),
        ('mathematical_names', {'class_names': ('$\\a{$', '$\\b{$', '$\\c{$')}),
    )
    def test_pictures_can_be_read(self, arguments):
        write(self.directory, **arguments)
        for name in ('fig1.png', 'fig2.png', 'fig3.png'):
            pixels = matplotlib_image.imread(self.directory / name)
            self.assertGreater(pixels[..., :3].std(), 0, name)


class FiguresTest(parameterized.TestCase):
    def test_all_maps_share_the_scale_from_0_to_1(self):
        config = make_config().occlusion
        for figure, count in (
            (figures.occlusion_figure(make_example(), class_names=NAMES, config=config), 2),
            (figures.maps_figure(make_maps(60), class_names=NAMES), 20),
        ):
            images = heatmap_images(figure)
            self.assertGreaterEqual(len(images), count)
            self.assertEqual({image.get_clim() for image in images}, {(0.0, 1.0)})
            self.assertLen({image.cmap.name for image in images}, 1)
            (bar,) = [image.colorbar for image in images if image.colorbar]
            self.assertEqual((bar.vmin, bar.vmax), (0.0, 1.0))

    def test_brighter_is_higher(self):
        (image, *_) = heatmap_images(figures.maps_figure(make_maps(60), class_names=NAMES))
        luminance = image.cmap(np.linspace(0, 1, 32))[:, :3] @ (0.2126, 0.7152, 0.0722)
        self.assertTrue(np.all(np.diff(luminance) > 0))

    def test_map_stands_upright_on_the_page(self):
        """One bright cell, in the first row and the last column, lights the top right corner."""
        heatmap = np.zeros((3, 3), np.float32)
        heatmap[0, 2] = 1
        example = make_example()._replace(clean_map=heatmap, predicted=0)
        config = make_config(side=12, size=4, stride=4).occlusion
        figure = figures.occlusion_figure(example, class_names=NAMES, config=config)
        (image,) = heatmap_images(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png')
        buffer.seek(0)
        pixels = matplotlib_image.imread(buffer)[..., :3].sum(-1)
        box = image.axes.get_window_extent()
        rows = len(pixels) - np.linspace(box.y1, box.y0, 7)[1::2]
        columns = np.linspace(box.x0, box.x1, 7)[1::2]
        # A third from the middle of each cell, where no number stands.
        aside = box.width / 3 * 0.3
        seen = pixels[np.ix_((rows - aside).astype(int), (columns - aside).astype(int))]
        np.testing.assert_array_equal(seen > 1.5, heatmap > 0.5)

    def test_window_covers_what_its_cell_of_the_map_says(self):
        example, config = make_example(), make_config(fill=(0.25,)).occlusion
        figure = figures.occlusion_figure(example, class_names=NAMES, config=config)
        origins = occlusion.window_origins((12, 12), size=4, stride=3, grid='floor')
        panels = [axes for axes in figure.axes if axes.get_images()]
        found = 0
        for axes in panels:
            array = np.asarray(axes.get_images()[0].get_array())
            if array.ndim != 3:
                continue
            head, verdict = axes.get_title(), axes.texts[0].get_text()
            clean = head.startswith('Clean')
            image, heatmap = example[0 if clean else 1], example[4 if clean else 5]
            row, column = np.argwhere((array != image).any(-1)).min(0)
            np.testing.assert_array_equal(array[row : row + 4, column : column + 4], 0.25)
            cell = np.flatnonzero((origins == (row, column)).all(1)).item()
            k = 0 if clean else 1
            self.assertEqual(verdict, f'P({NAMES[k]}) = {heatmap.flat[cell]:.2f}')
            found += 1
        self.assertEqual(found, 8)

    @parameterized.parameters(1, 2)
    def test_images_without_colours_are_drawn_from_black_to_white(self, channels):
        example = make_example(channels=channels)
        figure = figures.attack_figure([example], class_names=NAMES, epsilon=0.1)
        for axes, image in zip(figure.axes, example[:2], strict=True):
            (drawn,) = axes.get_images()
            np.testing.assert_array_equal(drawn.get_array(), image.mean(-1))
            self.assertEqual((drawn.cmap.name, *drawn.get_clim()), ('gray', 0, 1))

    def test_no_map_has_no_scale(self):
        self.assertEmpty(figures.maps_figure(make_maps(0), class_names=NAMES).axes)

    def test_class_of_figure_3(self):
        maps = make_maps(6, is_adversarial=np.array([0, 0, 1, 0, 1, 1], bool))
        self.assertEqual(figures.figure_class(maps, NAMES), 2)
        self.assertEqual(figures.figure_class(maps, ('Golf Ball', 'B', 'C')), 0)
        unattacked = maps.select(np.array([1, 4, 0]))  # two of class 1
        unattacked = HeatmapSet(**(vars(unattacked) | {'is_adversarial': np.zeros(3, bool)}))
        self.assertEqual(figures.figure_class(unattacked, NAMES), 1)

    def test_figure_3_keeps_the_kinds_apart(self):
        maps = make_maps(15)
        figure = figures.maps_figure(maps, class_names=NAMES)
        middle = 0.5 - 0.04  # The colour bar stands at the right.
        k = figures.figure_class(maps, NAMES)
        for image in heatmap_images(figure):
            adversarial = image.axes.get_position().x0 > middle
            chosen = maps.select((maps.predicted == k) & (maps.is_adversarial == adversarial))
            matches = [np.array_equal(image.get_array(), heatmap) for heatmap in chosen.maps]
            self.assertEqual(sum(matches), 1)


def test_bars_without_an_interval_are_hollow_and_whiskers_are_the_table_s():
    """And nothing is said of grey bars where the paper has no numbers."""
    for class_names in (NAMES, tuple(paper.CIFAR10.counts)):
        detection = make_results(class_names)['detection']['held_out']
        detection['per_class'][class_names[0]] |= {
            'balanced_accuracy': 0.95,
            'interval': {'balanced_accuracy': [0.8, 1.0]},
        }
        axes = figures.classes_figure(detection, class_names).axes[0]
        (whisker,) = [c for c in axes.containers if not hasattr(c, 'patches')]
        ((start, end),) = whisker.lines[2][0].get_segments()
        np.testing.assert_allclose((start[0], end[0]), (0.8, 1.0))
        has_paper = class_names != NAMES
        assert ('grey' in axes.get_xlabel()) == has_paper
        bars = [c.patches[0] for c in axes.containers if hasattr(c, 'patches')]
        ours = [bar for bar in bars if bar.get_facecolor()[:3] != to_rgb(canvas.PALE)]
        assert len(bars) - len(ours) == (11 if has_paper else 0)
        hollow = [bar.get_facecolor()[:3] == (1, 1, 1) for bar in ours]
        assert hollow == [False] + [True] * (len(class_names) + 1)
        label = axes.get_yticklabels()[0].get_text()
        n = [detection['per_class'][class_names[0]][f'n_{k}'] for k in ('correct', 'adversarial')]
        assert label == '{} ({:,} + {:,})'.format(class_names[0], *n)


def test_the_paper_s_detector_is_among_all_that_was_tried(tmp_path):
    results = make_results(NAMES)
    held_out = results['detection']['held_out']
    for auroc, best in ((0.999, 'detector'), (0.001, 'map_mean')):
        rival = held_out['baselines']['map_mean'] | {'auroc_with_noise': 0.5}
        held_out['baselines'] = {'map_mean': rival}
        held_out['overall']['auroc_with_noise'] = auroc
        ((number, said),) = ((n, text) for n, text in page._verdict(held_out) if 'best' in text)
        assert said.endswith(f'of all that was tried, on the same images: {tables.words(best)}.')
        assert number == f'{max(auroc, 0.5):.3f}'


def test_intervals_controls_and_costs_have_their_places():
    results = make_results(NAMES)
    rates = {'n': 321, 'flagged': 0.125, 'flagged_at_5_fpr': 0.0625}
    rates['interval'] = {'flagged': (0.1, 0.15), 'flagged_at_5_fpr': None}
    rates['over'] = {'flagged_at_5_fpr': [200, 321]}
    held_out = results['detection']['held_out']
    held_out['overall'] |= {
        'auroc': 0.75,
        'tpr_at_5_fpr': 0.25,
        'interval': {'auroc': (0.7, 0.8)},
        'over': {'auroc': [49, 50], 'tpr_at_5_fpr': [42, 50]},
        'controls': {'noise': rates, 'failed': rates | {'n': 54, 'over': {}}},
    }
    held_out['baselines']['pooled'] = dict(held_out['baselines']['map_mean'], auroc=0.625)
    results['cost'] = {
        'detector': {'forward_passes': 17, 'gflop': 6.25, 'milliseconds': None},
        'max_probability': {'forward_passes': 1, 'gflop': 0.375, 'milliseconds': 12.5},
    }
    listed = {table.title: table for table in tables.build(results, [], NAMES)}
    overall = listed['Table VI. Overall']
    line = next(row for row in overall.rows if row[:2] == ('held out', "Paper's detector"))
    # Of how many maps a rate is stands beside it where not all have it.
    assert {'0.750 ± 0.050 (49 of 50)', '0.250 (42 of 50)'} <= set(line)
    assert any(
        row[:2] == ('held out', tables.words('pooled')) and '0.625' in row for row in overall.rows
    )
    per_class = next(
        t
        for title, t in listed.items()
        if title.endswith('protocol held out') and 'Flagged' not in title
    )
    assert not any(tables.words('pooled') in cell for cell in per_class.header)
    assert {'0.750 (49 of 50)', '0.250 (42 of 50)'} <= set(per_class.total)
    controls = listed['Flagged besides, protocol held out']
    assert controls.header[:4] == ('Method', 'Noise: n', 'Noise: share', 'Noise: share at 5 % FPR')
    assert controls.rows[0] == (
        "Paper's detector",
        '321',
        '0.125 ± 0.025',
        '0.062 (200 of 321)',
        '54',
        '0.125 ± 0.025',
        '0.062',
    )
    methods = ('detector', 'max_probability', 'map_mean', 'pooled')
    assert [row[0] for row in controls.rows] == [tables.words(name) for name in methods]
    assert set(controls.rows[1][1:]) == {'–'}
    assert listed['What a verdict costs'].rows == [
        ("Paper's detector", '17', '6.250', '–'),
        ('Unoccluded probability', '1', '0.375', '12.500'),
    ]
    assert 'Flagged besides, protocol paper' not in listed


if __name__ == '__main__':
    absltest.main()
