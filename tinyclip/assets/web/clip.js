// A CLIP in a browser: words and pictures to rows of unit length, from a folder of `tinyclip export --to web`.
// The page needs an import map that sends 'onnxruntime-common' and 'onnxruntime-web/webgpu' to
// runtime/ort.wasm.bundle.min.mjs (see index.html).
import {PreTrainedTokenizer} from './runtime/transformers.web.min.js'

const worker = new Worker(new URL('./worker.js', import.meta.url), {type: 'module'})
const waiting = new Map()
let asked = 0

worker.onmessage = ({data: {id, bytes, done, failed}}) => {
  const {resolve, reject, said} = waiting.get(id)
  if (bytes !== undefined) return said?.(bytes)
  waiting.delete(id)
  failed === undefined ? resolve(done) : reject(Error(failed))
}
worker.onerror = e => waiting.forEach(w => w.reject(Error(e.message ?? 'the runtime cannot be loaded')))

function ask(does, given, said) {
  return new Promise((resolve, reject) => {
    waiting.set(++asked, {resolve, reject, said})
    worker.postMessage({id: asked, does, ...given})
  })
}

const json = async url => {
  const answer = await fetch(url)
  if (!answer.ok) throw Error(`${url} cannot be read (${answer.status} ${answer.statusText})`)
  return answer.json()
}

const ENDING = {fp32: '', fp16: '_fp16', q8: '_quantized'}
const WASM = new URL('./runtime/ort-wasm-simd-threaded.wasm', import.meta.url).href
let runtime  // one for all models

// RGBA pixels of a file, a video, a canvas or an image
export async function pixelsOf(source) {
  const bitmap = await createImageBitmap(source, {colorSpaceConversion: 'none'})
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height)
  const c = canvas.getContext('2d', {willReadFrequently: true})
  c.fillStyle = '#fff'  // what is transparent is white
  c.fillRect(0, 0, bitmap.width, bitmap.height)
  c.drawImage(bitmap, 0, 0)
  const {data, width, height} = c.getImageData(0, 0, bitmap.width, bitmap.height)
  bitmap.close()
  return {data, width, height}
}

export const dot = (a, b) => a.reduce((sum, v, i) => sum + v * b[i], 0)

export class Clip {
  // What a folder holds, before its models are loaded
  static async about(folder) {
    return new Clip(folder, await json(new URL('web_config.json', folder)))
  }

  constructor(folder, config) {
    Object.assign(this, {folder, config, known: new Map()})
  }

  files(dtype) {
    const name = kind => `onnx/${kind}_model${ENDING[dtype]}.onnx`
    return {image: name('vision'), text: name('text')}
  }

  runtimeBytes() {
    return Object.values(this.config.runtime).reduce((sum, n) => sum + n, 0)
  }

  bytes(dtype) {
    const files = ['tokenizer.json', ...Object.values(this.files(dtype))]
    return files.reduce((sum, f) => sum + this.config.files[f], 0)
  }

  // `said(n)`: n more bytes have come
  async load(dtype, said = () => {}) {
    runtime ??= ask('runtime', {url: WASM}, said)
    await runtime
    const [tokens, settings] = await Promise.all(
      ['tokenizer.json', 'tokenizer_config.json'].map(f => json(new URL(f, this.folder))))
    this.tokenizer = new PreTrainedTokenizer(tokens, settings)
    said(this.config.files['tokenizer.json'])
    const at = Object.entries(this.files(dtype)).map(([k, f]) => [k, new URL(f, this.folder).href])
    this.name = `${this.folder} ${dtype}`
    await ask('load', {name: this.name, config: this.config, files: Object.fromEntries(at)}, said)
    this.known.clear()
    return this
  }

  // A row per text; texts that were asked for before are remembered
  async texts(texts) {
    const fresh = [...new Set(texts)].filter(t => !this.known.has(t))
    for (let i = 0; i < fresh.length; i += 16) {
      const some = fresh.slice(i, i + 16)
      const {input_ids, attention_mask} = this.tokenizer(some, {padding: true, truncation: true})
      const given = {ids: input_ids.data, mask: attention_mask.data, dims: input_ids.dims}
      const rows = await ask('text', {name: this.name, ...given})
      const wide = rows.length / some.length
      some.forEach((t, j) => this.known.set(t, rows.slice(j * wide, (j + 1) * wide)))
    }
    return texts.map(t => this.known.get(t))
  }

  // The row of a picture: anything that `pixelsOf` takes
  async picture(source) {
    return ask('image', {name: this.name, picture: await pixelsOf(source)})
  }

  // Shares of texts in a picture: of all of them together, or, for SigLIP, of each for itself
  shares(image, texts) {
    const {logit_scale: scale, logit_bias: bias} = this.config
    const logits = texts.map(t => scale * dot(image, t) + (bias ?? 0))
    if (bias !== null) return logits.map(l => 1 / (1 + Math.exp(-l)))
    const most = Math.max(...logits), e = logits.map(l => Math.exp(l - most))
    const sum = e.reduce((a, b) => a + b, 0)
    return e.map(v => v / sum)
  }
}
