"""What training does to small models from fixed seeds: losses, keeps, weights and an export, as
numbers to compare with."""

import hashlib
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch

TEXT = dict(context_length=12, vocab_size=300, width=64, heads=4, layers=2)
VISION = dict(image_size=32, layers=2, width=64, patch_size=8, head_width=16)


class Batch(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor


class Pairs:
    "Random images, each with a caption of its own, the same in every epoch"

    def __init__(self, batches=4, size=16):
        g = torch.Generator().manual_seed(1)
        self.batches = [self.batch(g, size) for _ in range(batches)]

    def batch(self, g, size):
        image = torch.randn(size, 3, 32, 32, generator=g)
        text = torch.randint(1, 298, (size, 12), generator=g)
        text[:, -1] = 299
        return Batch(image, text)

    def epoch(self, e, start=0):
        yield from self.batches[start:]


def teacher():
    torch.manual_seed(0)
    return open_clip.model.CLIP(32, VISION, TEXT).eval()


def digest(tensors):
    "One hash of all tensors, in order"
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().float().contiguous().numpy().tobytes())
    return h.hexdigest()


def weights(model):
    "Digest, and a sum per tensor for machines whose rounding differs"
    state = model.state_dict()
    tensors = [state[k] for k in sorted(state) if state[k].is_floating_point()]
    return dict(digest=digest(tensors), norms=[t.double().norm().item() for t in tensors])


def distilled(**settings):
    "20 steps of a half student: its losses and what it ends with"
    from tinyclip.distill import Distiller
    from tinyclip.inheritance import inherit
    from tinyclip.keep import manual

    t = teacher()
    student = inherit(t, manual(t, image_width=0.5, text_depth=0.5))
    losses = []
    job = Distiller(
        student,
        t,
        Pairs(),
        objective=['affinity', 'contrastive'],
        lr=1e-3,
        device='cpu',
        log_every=1,
        listeners=[lambda e: losses.append(e['loss']) if e['event'] == 'log' else None],
        progress=False,
        **settings,
    )
    job.fit(20)
    return dict(losses=losses, weights=weights(student))


def staged(folder):
    "Masks, cut, distillation, twice: what was kept and what it ends with"
    from tinyclip.stages import Stage, Stages
    from tinyclip.zoo.loading import load

    t, losses = teacher(), []
    plan = [Stage(share=0.6, mask_steps=8, steps=6), Stage(share=0.4, mask_steps=6, steps=4)]
    Stages(
        t,
        Pairs(),
        plan,
        folder,
        lr=1e-3,
        device='cpu',
        precision='fp32',
        log_every=1,
        listeners=[lambda e: losses.append(e['loss']) if e['event'] == 'log' else None],
        progress=False,
    ).fit()
    out = dict(losses=losses)
    for i in (1, 2):
        student = load(Path(folder) / f'stage-{i}' / 'student').model
        index = student.keep.axes if hasattr(student, 'keep') else {}
        out[f'stage-{i}'] = dict(
            weights=weights(student), keep={a: list(v) for a, v in index.items()}
        )
    return out


def masked():
    "A masked model cut at once: its keep and the features of the cut"
    from tinyclip.masking import MaskedCLIP

    torch.manual_seed(3)
    m = MaskedCLIP(teacher(), kinds=('heads', 'ffn', 'width', 'attention'))
    with torch.no_grad():
        m.log_alpha.add_(3 * torch.randn(len(m.log_alpha)) - 2)
    m.eval()
    batch = Pairs().batches[0]
    keep, student = m.keep(), m.cut()
    with torch.no_grad():
        inside, outside = m(*batch), student(*batch)
    return dict(
        keep={a: list(v) for a, v in keep.axes.items()},
        masked=digest(inside[:2]),
        cut=digest(outside[:2]),
        features=outside[0][0].tolist(),
    )


def exported(folder):
    "An ONNX export of a cut student, as onnxruntime answers"
    import onnxruntime

    from tinyclip.inheritance import inherit
    from tinyclip.keep import manual

    t = teacher()
    student = inherit(t, manual(t, image_width=0.5, text_depth=0.5))
    write_onnx(student, folder)
    batch = Pairs().batches[0]
    out = []
    for kind, x in (('image', batch.image), ('text', batch.text)):
        s = onnxruntime.InferenceSession(str(Path(folder) / f'{kind}.onnx'))
        out.append(torch.from_numpy(s.run(None, {s.get_inputs()[0].name: x.numpy()})[0]))
    return dict(digest=digest(out), features=[o[0].tolist() for o in out])


def write_onnx(student, folder):
    from tinyclip.zoo.onnx import to_onnx

    to_onnx(student, folder)


def numbers(folder):
    "All of it"
    settings = dict(
        plain=dict(precision='fp32'),
        chunks=dict(precision='fp32', chunk_size=4),
        bf16=dict(precision='bf16'),
        bf16_chunks=dict(precision='bf16', chunk_size=4),
    )
    out = {name: distilled(**s) for name, s in settings.items()}
    return out | dict(
        masked=masked(),
        staged=staged(Path(folder) / 'stages'),
        onnx=exported(Path(folder) / 'onnx'),
    )


def machine():
    "What bit-identity needs to be the same"
    import onnxruntime

    lines = Path('/proc/cpuinfo').read_text().splitlines() if sys.platform == 'linux' else []
    cpu = next((x.split(':')[1].strip() for x in lines if x.startswith('model name')), '')
    flags = next((x.split(':')[1].split() for x in lines if x.startswith('flags')), [])
    return dict(
        torch=torch.__version__,
        onnxruntime=onnxruntime.__version__,
        isa=torch.backends.cpu.get_cpu_capability(),
        cpu=cpu or platform.processor(),
        bf16=sorted({'amx_bf16', 'avx512_bf16'} & set(flags)),  # one name, several kinds
        threads=torch.get_num_threads(),
    )


if __name__ == '__main__':
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as tmp:
        record = dict(machine=machine(), **numbers(tmp))
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + '\n')
