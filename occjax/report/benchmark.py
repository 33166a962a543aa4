"""What a benchmark found, as a table and as a plot.

Heat maps of an engine, and of a peer, have rates a second; see `benchmark` for the rest.
"""

from occjax.report import canvas


def table(result: dict) -> str:
    """Returns what `benchmark.json` holds as lines for a person."""
    size, stride, side = result['size'], result['stride'], result['image_size']
    rates = result['matrix_product_flops_per_second']
    lines = [
        f'{result["network"]}, {result["weights"]} weights, {result["dtype"]}: {result["images"]} '
        f'images of {side}x{side}, windows of {size} at stride {stride}, '
        f'{result["windows_per_map"]} a map',
        f'{result["devices"]} x {result["device"]}, matrix products at '
        + ', '.join(f'{rate / 1e9:.0f} GFLOP/s ({name})' for name, rate in rates.items()),
        f'peak memory {result["peak_memory_bytes"] / 2**20:.0f} MiB',
        '',
    ]
    columns = {
        'engine': lambda name, row: name,
        'maps/s': lambda name, row: f'{row["maps_per_second"]:.4g}',
        'windows/s': lambda name, row: f'{row["windows_per_second"]:.4g}',
        'seconds, median (least to most)': lambda name, row: '{:.4g} ({:.4g} to {:.4g})'.format(
            row['seconds_median'], *row['seconds_spread']
        ),
        'compile s': lambda name, row: f'{row["compile_seconds"]:.1f}',
        'GFLOP/map': lambda name, row: f'{row["flops_per_map"] / 1e9:.4g}',
        'GFLOP/s': lambda name, row: f'{row["flops_per_second"] / 1e9:.4g}',
        'of products': lambda name, row: f'{row["share_of_matrix_product_rate"]:.0%}',
        'difference': lambda name, row: f'{row["largest_difference"]:.1e}',
        'SSIM': lambda name, row: f'{row["ssim"]:.3f}',
    }
    peer_row = result.get('peer')
    if peer_row:
        columns[f'x {peer_row["name"]}'] = lambda name, row: f'{row["times_peer"]:.2f}'
    cells = [list(columns)]
    cells += [
        [column(name, row) for column in columns.values()]
        for name, row in result['engines'].items()
    ]
    lines += _aligned(cells)
    if result['backend'] == 'cpu':
        taken = (f'{count} of {name}' for name, count in result['forms'].items())
        lines += ['', f'Convolutions and pools: {"; ".join(taken)}.']
    if peer_row:
        lines += ['', describe(peer_row)]
    lines += [
        '',
        'FLOPs are those of convolutions as written: forms that need fewer multiplications can '
        "exceed the products' rate. A difference is of probabilities, from the plain engine.",
    ]
    return '\n'.join(lines)


def compiled_table(result: dict) -> str:
    """Returns what `benchmark_<target>.json` holds as lines for a person."""
    columns = {
        'program': lambda name, row: name,
        'MiB': lambda name, row: f'{row["temporary_bytes"] / 2**20:,.0f}',
        'of arguments': lambda name, row: f'{row["argument_bytes"] / 2**20:,.0f}',
        'MB exchanged': lambda name, row: f'{sum(row["collectives"].values()) / 1e6:,.1f}',
    }
    if 'cycles' in next(iter(result['programs'].values())):
        columns |= {
            'predicted cycles': lambda name, row: f'{row["cycles"]:,}',
            'predicted a second': lambda name, row: (
                f'{row["per_second"]:,.0f} {row["unit"]}' if row['per_second'] else 'unknown clock'
            ),
            'most cycles in': lambda name, row: ', '.join(
                f'{kind} {share:.0%}' for kind, share in [*row['share_of_cycles'].items()][:3]
            ),
        }
    else:
        columns |= {
            'loops': lambda name, row: f'{row["loops"]}',
            'fused kernels': lambda name, row: f'{row["fusions"]}',
            'library calls': lambda name, row: f'{sum(row["library_calls"].values())}',
        }
    cells = [[*columns]]
    cells += [[cell(*item) for cell in columns.values()] for item in result['programs'].items()]
    versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items())
    lines = [
        f'{result["network"]}, {result["image_size"]}x{result["image_size"]}, windows of '
        f'{result["size"]} at stride {result["stride"]}, {result["images_per_device"]} images on '
        f'each of {result["devices"]} x {result["device"]}, precision {result["precision"]}',
        '',
        *_aligned(cells),
        '',
        f'Predicted by the compiler ({versions}); nothing was run. All figures are of one device.',
    ]
    return '\n'.join(lines)


def _aligned(cells):
    """Returns rows of cells as lines with columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in cells]


def describe(row: dict) -> str:
    """Returns a line for a person about what `peer.measure` found."""
    least, most = row['seconds_spread']
    return (
        f'{row["name"]} ({row["device"]}, {row["layout"]}, images at once {row["batch_size"]}, '
        f'perturbations_per_eval {row["perturbations_per_eval"]}, the best of '
        f'{len(row["tried"])} settings): {row["windows_per_second"]:.4g} windows/s, '
        f'{row["windows_per_map"]} a map, {row["seconds_median"]:.4g} s '
        f'({least:.4g} to {most:.4g}); its classifier differs from ours by '
        f'{row["largest_difference"]:.1e}.'
    )


def plot(result: dict) -> bytes:
    """Returns a PNG: windows a second by engine, and the peer's."""
    rates = {name: row['windows_per_second'] for name, row in result['engines'].items()}
    if 'peer' in result:
        rates[result['peer']['name']] = result['peer']['windows_per_second']
    figure, axes = canvas.axes(6.4, 1.2 + 0.5 * len(rates))
    names = list(rates)[::-1]
    bars = axes.barh(names, [rates[name] for name in names], color='#00a3ff', height=0.6)
    axes.bar_label(bars, labels=[f'{rates[name]:.3g}' for name in names], padding=4)
    axes.set_xlim(0, max(rates.values()) * 1.15)
    axes.set_xlabel('windows a second')
    axes.set_title(
        f'{result["network"]}, {result["image_size"]} pixels, windows of {result["size"]} '
        f'at stride {result["stride"]}, {result["device"]}',
        fontsize=10,
    )
    return canvas.encode(figure, 'png')
