"""What scores and a reconstruction cost at full size: seconds and memory. Weights, images and texts
are random; neither depends on them.

    python benchmarks/full_size.py  # writes results/full-size/run.json
                                    # (with a GPU: results/full-size-cuda)
"""

import argparse
import resource
import time

import open_clip
import torch

from tinyclip.core import Table, record_run, seed_everything
from tinyclip.inheritance import inherit
from tinyclip.reconstruction import reconstruct
from tinyclip.scores import unit_scores


def peak(device) -> float:
    "Most memory so far in GB: of the process, or of the GPU"
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(device, f):
    "What a function gives; wall-clock and processor seconds"
    wall, cpu = time.perf_counter(), time.process_time()
    out = f()
    if device == 'cuda':
        torch.cuda.synchronize()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def random_pairs(clip, samples, batch):
    "Batches of noise and of texts of random length"
    size, vocabulary = clip.visual.image_size, clip.token_embedding.num_embeddings
    for _ in range(samples // batch):
        texts = torch.randint(1, vocabulary - 2, (batch, clip.context_length))
        ends = torch.randint(5, 30, (batch,))
        texts[torch.arange(clip.context_length) > ends[:, None]] = 0
        texts[torch.arange(batch), ends] = vocabulary - 1
        yield torch.randn(batch, 3, *size), texts


def rows_of(name, samples, share, device, batch):
    "Scores, the cut, and its reconstruction: a row each"
    clip = open_clip.create_model(name, device=device).eval()
    pairs = [*random_pairs(clip, samples, batch)]

    def row(what, wall, cpu):
        return dict(
            model=name, what=what, samples=samples, share=share, wall=wall, cpu=cpu, gb=peak(device)
        )

    yield row('before', 0.0, 0.0)
    scores, *spent = timed(device, lambda: unit_scores(clip, pairs, samples=samples))
    yield row('scores', *spent)
    keep, *spent = timed(device, lambda: scores.keep(share))
    yield row('choice', *spent)
    student = inherit(clip, keep)
    _, *spent = timed(device, lambda: reconstruct(student, clip, pairs, samples))
    yield row('reconstruction', *spent)


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--models', nargs='+', default=['ViT-B-32'])
    p.add_argument('--samples', type=int, default=1000)
    p.add_argument('--share', type=float, default=0.5)
    p.add_argument('--batch', type=int, default=50)
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    seed_everything(0)
    rows = []
    for name in a.models:
        for row in rows_of(name, a.samples, a.share, device, a.batch):
            rows.append(row)
            print(row, flush=True)
    recipe = dict(samples=a.samples, share=a.share, batch_size=a.batch)
    recipe |= dict(threads=torch.get_num_threads(), precision='fp32, sums in float64')
    print(Table(rows), record_run('full-size' + '-cuda' * (device == 'cuda'), recipe, rows, [0]))
