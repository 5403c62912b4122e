"""Text towers and tokenizers of Hugging Face in open_clip models: loaded as open_clip does,
counted, exported, and evaluated with the tokenizer that came along"""

import json

import open_clip
import pytest
import torch

transformers = pytest.importorskip(
    'transformers', reason="transformers is optional: pip install 'tinyclip[export]'"
)
from hub import same
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tinyclip.cli.main import main
from tinyclip.core import TinyclipError
from tinyclip.data.transforms import check_inputs
from tinyclip.evaluate import class_embeddings
from tinyclip.evaluate.agreement import model_answers
from tinyclip.evaluate.cost import macs, parameters, profile
from tinyclip.zoo import load, save
from tinyclip.zoo.folders import tokenizer_cfg
from tinyclip.zoo.formats import open_model
from tinyclip.zoo.onnx import save_tokenizer, to_onnx
from tinyclip.zoo.vocabulary import table_sizes

VISION = dict(image_size=32, layers=1, width=16, head_width=8, patch_size=16)
WORDS = ['<s>', '<pad>', '</s>', '<unk>', 'a', 'photo', 'of', 'red', 'blue', 'Red', '.']


def tokenizer(folder, rows=300):
    "A fast tokenizer of whole words, saved; `Red` and `red` differ, and so do texts with a dot"
    more = {f'w{i}': i for i in range(len(WORDS), rows)}
    vocab = {w: i for i, w in enumerate(WORDS)} | more
    t = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)]
    )
    names = dict(bos_token='<s>', pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, cls_token='<s>', sep_token='</s>', **names
    )
    fast.save_pretrained(str(folder))


BERT = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
BERT |= dict(intermediate_size=64, pad_token_id=1)
TOWERS = {
    'xlm-roberta': (
        lambda: transformers.XLMRobertaConfig(**BERT, max_position_embeddings=514),
        dict(hf_pooler_type='mean_pooler', hf_proj_type='mlp'),
        77,
    ),
    'roberta': (
        lambda: transformers.RobertaConfig(**BERT, max_position_embeddings=130),
        dict(hf_pooler_type='mean_pooler', hf_proj_type='linear', context_length=64),
        64,
    ),
    'bert': (
        lambda: transformers.BertConfig(**BERT, max_position_embeddings=512),
        dict(hf_pooler_type='cls_last_hidden_state_pooler', context_length=256),
        256,
    ),
    'nllb': (
        lambda: transformers.M2M100Config(
            vocab_size=300,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        ),
        dict(hf_pooler_type='cls_pooler', hf_proj_type='linear'),
        77,
    ),
    'mt5': (
        lambda: transformers.MT5Config(
            vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=1
        ),
        dict(hf_pooler_type='mean_pooler', context_length=20),
        20,
    ),
}


def folder_of(folder, kind):
    "An open_clip folder with a text tower of Hugging Face, configured as open_clip ships it"
    hf, text, _ = TOWERS[kind]
    hf().save_pretrained(str(folder))
    tokenizer(folder)
    text = text | dict(hf_model_name=str(folder), hf_tokenizer_name=str(folder))
    cfg = dict(embed_dim=24, vision_cfg=VISION, text_cfg=text)
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**cfg | dict(text_cfg=text | dict(hf_model_pretrained=False)))
    torch.save(model.state_dict(), folder / 'open_clip_pytorch_model.bin')
    held = dict(model_cfg=cfg, preprocess_cfg={})
    (folder / 'open_clip_config.json').write_text(json.dumps(held))
    return folder


def by_hand(kind, n):
    "Multiply-accumulates of the text tower for `n` tokens: width 32, two heads of 16, MLP of 64"
    w, layers = 32, 2
    mlp = 3 if kind == 'mt5' else 2  # a gated one
    head = {'linear': w * 24, 'mlp': w * 28 + 28 * 24}[TOWERS[kind][1].get('hf_proj_type', 'mlp')]
    return layers * (4 * n * w * w + mlp * n * w * 64 + 2 * n * n * w) + head


@pytest.mark.parametrize('kind', TOWERS)
def test_a_text_tower_of_hugging_face(kind, tmp_path):
    context = TOWERS[kind][2]
    loaded = load(folder_of(tmp_path, kind))
    name = f'local-dir:{tmp_path}'
    theirs = open_clip.create_model(name, pretrained_text=False).eval()
    texts = ['a photo of red', 'a blue photo', 'w20']
    ids = loaded.tokenizer(texts)
    assert type(loaded.model) is type(theirs) is open_clip.CustomTextCLIP
    assert torch.equal(ids, open_clip.get_tokenizer(name)(texts)) and ids.shape == (3, context)
    with torch.no_grad():
        same(loaded.model.encode_text(ids), theirs.encode_text(ids))
    assert loaded.model.context_length == context
    check_inputs(loaded.model, (32, 32), context)
    check_inputs(loaded.model, (32, 32), context - 4)  # shorter ones cost less, and mean the same
    with pytest.raises(TinyclipError, match=f'teacher takes {context}'):
        check_inputs(loaded.model, (32, 32), context + 1)
    counted = parameters(loaded.model)
    assert counted['token_table'] == 300 * 32
    assert counted['total'] == sum(p.numel() for p in loaded.model.parameters())
    assert macs(loaded.model)['text'] == by_hand(kind, context)


def test_it_is_measured_and_evaluated(tmp_path):
    loaded = load(folder_of(tmp_path, 'xlm-roberta'))
    row = profile(dict(m=loaded.model), 2, repeats=2)['m']
    assert row['text_macs'] == by_hand('xlm-roberta', 77) and row['batch_size'] == 2
    assert table_sizes(dict(m=loaded.model))[0]['tokens'] == 300
    z = class_embeddings(loaded.model, loaded.tokenizer, ['red', 'blue'], 'a photo of {}')
    assert z.shape == (2, 24) and z.isfinite().all()
    batch = torch.zeros(2, 3, 32, 32), loaded.tokenizer(['red', 'blue']), torch.arange(2)
    assert model_answers(loaded.model, [batch]).text.shape == (2, 24)


def test_made_by_open_clip_itself(tmp_path):
    "Such a model does not know the length of its texts: those of its tokenizer fit"
    folder_of(tmp_path, 'xlm-roberta')
    model = open_clip.create_model(f'local-dir:{tmp_path}', pretrained_text=False)
    check_inputs(model, (32, 32), 77)
    folder_of(tmp_path, 'mt5')
    model = open_clip.create_model(f'local-dir:{tmp_path}', pretrained_text=False)
    assert macs(model)['text'] == by_hand('mt5', 77)  # open_clip's own default


def test_exported_and_opened_by_its_folder(tmp_path):
    loaded = load(folder_of(tmp_path, 'xlm-roberta'))
    to_onnx(loaded.model, tmp_path / 'onnx', loaded.tokenizer)
    again = open_model(tmp_path / 'onnx', 'cpu')
    texts = ['a photo of red', 'a blue photo']
    ids = again.tokenizer(texts)
    assert torch.equal(ids, loaded.tokenizer(texts))
    with torch.no_grad():
        same(again.model.encode_text(ids), loaded.model.encode_text(ids, normalize=True), 1e-4)


# ---- the tokenizer of an export


def siglip_like(folder, **options):
    "A model of open_clip's own towers with a tokenizer of Hugging Face"
    tokenizer(folder)
    text = dict(context_length=12, vocab_size=300, width=32, heads=2, layers=1)
    text |= dict(no_causal_mask=True, pool_type='last')
    cfg = dict(embed_dim=16, custom_text=True, vision_cfg=VISION, text_cfg=text)
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=VISION, text_cfg=text)
    torch.save(model.state_dict(), folder / 'open_clip_pytorch_model.bin')
    text |= dict(hf_tokenizer_name=str(folder), **options)
    held = dict(model_cfg=cfg, preprocess_cfg=dict(mean=[0.5] * 3, interpolation='bilinear'))
    (folder / 'open_clip_config.json').write_text(json.dumps(held))
    return folder


OPTIONS = [
    {},
    dict(tokenizer_kwargs=dict(clean='canonicalize')),
    dict(tokenizer_kwargs=dict(strip_sep_token=True)),
    dict(tokenizer_mode='clips', tokenizer_kwargs=dict(clean='lower')),
]
TEXTS = ['a Red photo.', 'a  photo of blue . ', 'w12 w13']


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_the_tokenizer_of_an_export(options, tmp_path, monkeypatch):
    from tinyclip.zoo import onnx
    from tinyclip.zoo.formats import _onnx_tokenizer

    loaded = load(siglip_like(tmp_path, **options))
    want = loaded.tokenizer(TEXTS)
    bare = open_clip.CustomTextCLIP(16, VISION, dict(context_length=12, vocab_size=300, width=16))
    for i, model in enumerate((loaded.model, bare)):  # one that knows it, one that is told
        kind, own = save_tokenizer(model, loaded.tokenizer, tmp_path / f'{i}')
        config = json.loads(json.dumps(dict(tokenizer=kind, tokenizer_cfg=own)))
        export = onnx.SimpleNamespace(config=config, context_length=12)
        assert torch.equal(_onnx_tokenizer(export, tmp_path / f'{i}')(TEXTS), want)
        save(model, tmp_path / f'folder{i}', tokenizer=loaded.tokenizer)
        assert torch.equal(load(tmp_path / f'folder{i}').tokenizer(TEXTS), want)


def test_options_of_clips_own_tokenizer_come_along(tmp_path):
    "tokenizer_kwargs without a name belong to CLIP's BPE, which has no files to save"
    from tinyclip.zoo.formats import _onnx_tokenizer
    from tinyclip.zoo.onnx import SimpleNamespace

    text = dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1)
    model = open_clip.CLIP(16, VISION, text)
    model.tokenizer_cfg = dict(tokenizer_kwargs=dict(clean='whitespace'))
    plain = open_clip.SimpleTokenizer(context_length=12, clean='whitespace')
    assert not torch.equal(plain(TEXTS), open_clip.SimpleTokenizer(context_length=12)(TEXTS))
    kind, own = save_tokenizer(model, plain, tmp_path)
    export = SimpleNamespace(config=dict(tokenizer=kind, tokenizer_cfg=own), context_length=12)
    assert torch.equal(_onnx_tokenizer(export, tmp_path)(TEXTS), plain(TEXTS))
    save(model, tmp_path / 'm', tokenizer=plain)
    assert torch.equal(load(tmp_path / 'm').tokenizer(TEXTS), plain(TEXTS))


def test_tokenizers_that_no_folder_holds(tmp_path):
    loaded = load(folder_of(tmp_path, 'bert'))
    del loaded.model.tokenizer_cfg
    with pytest.raises(TinyclipError, match='pass it as tokenizer=tokenizer'):
        tokenizer_cfg(loaded.model)
    with pytest.raises(TinyclipError, match='is a function.*open_clip.get_tokenizer'):
        tokenizer_cfg(open_clip.CLIP(16, VISION, dict(layers=1, width=16)), lambda texts: None)


def test_the_command_line_evaluates_an_export_as_its_model(tmp_path, capsys):
    folder = tmp_path / 'model'
    folder.mkdir()
    siglip_like(folder)
    for i, name in enumerate(('red', 'blue', 'Red')):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for j in range(2):
            picture = Image.new('RGB', (40, 32), (80 * i, 30 * j, 50))
            picture.save(tmp_path / 'data' / name / f'{j}.png')
    data = ['--data', str(tmp_path / 'data'), '--json']
    out = str(tmp_path / 'onnx')
    assert not main(['export', str(folder), '--to', 'onnx', '--out', out, *data])
    rows = json.loads(capsys.readouterr().out)['rows']
    assert len(rows) == 2 and rows[0]['top1'] == rows[1]['top1']
    assert not main(['eval', str(folder), out, '--teacher', out, *data])
    rows = json.loads(capsys.readouterr().out)['rows']
    assert [r['agree'] for r in rows] == [1.0, 1.0] and max(r['kl'] for r in rows) < 1e-4
    assert rows[0]['top1'] == rows[1]['top1'] == rows[0]['teacher_top1']
