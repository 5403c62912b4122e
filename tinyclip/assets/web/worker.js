// The towers of a CLIP in onnxruntime-web, and pictures made ready for them as Pillow does it.
// A worker of its own: the page stays usable while a model runs.
import * as ort from './runtime/ort.wasm.bundle.min.mjs'

const PRECISION = 22  // Bits of Pillow's resampling weights
const FILTERS = {
  bicubic: [2, x => (x = Math.abs(x), x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0)],
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
}

// First pixel and whole-number weights of every pixel of a line that is to have `to` pixels
function weights(from, to, filter) {
  const [reach, f] = FILTERS[filter]
  const scale = from / to
  const wide = Math.max(scale, 1)
  return Array.from({length: to}, (_, i) => {
    const centre = (i + 0.5) * scale
    const first = Math.max(0, Math.trunc(centre - reach * wide + 0.5))
    const last = Math.min(from, Math.trunc(centre + reach * wide + 0.5))
    const k = Array.from({length: last - first}, (_, j) => f((j + first - centre + 0.5) / wide))
    const sum = k.reduce((a, b) => a + b, 0)
    return [first, k.map(v => Math.trunc((v < 0 ? -0.5 : 0.5) + (v / sum) * 2 ** PRECISION))]
  })
}

// One direction of a resize: `lines` lines of pixels, `step` numbers from pixel to pixel
function resample(data, from, to, lines, step, lineStep, outStep, outLineStep, filter) {
  const out = new Uint8ClampedArray(to * lines * 3)
  weights(from, to, filter).forEach(([first, k], i) => {
    for (let l = 0; l < lines; l++) {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (PRECISION - 1)
        for (let j = 0; j < k.length; j++) sum += data[(first + j) * step + l * lineStep + c] * k[j]
        out[i * outStep + l * outLineStep + c] = Math.floor(sum / 2 ** PRECISION)
      }
    }
  })
  return out
}

// `{data, width, height}` of three channels -> the same in another size; the width goes first. Versions of
// Pillow take the two in either order, which changes how numbers are rounded in between
function resize({data, width, height}, w, h, filter) {
  if (width !== w) data = resample(data, width, w, height, 3, width * 3, 3, w * 3, filter)
  if (height !== h) data = resample(data, height, h, w, w * 3, 3, w * 3, 3, filter)
  return {data, width: w, height: h}
}

const even = x => { const r = Math.round(x); return r - x === 0.5 && r % 2 ? r - 1 : r }  // Python's round

function rgb({data, width, height}) {
  const out = new Uint8ClampedArray(width * height * 3)
  for (let i = 0, j = 0; i < data.length; i += 4) {
    out[j++] = data[i]
    out[j++] = data[i + 1]
    out[j++] = data[i + 2]
  }
  return {data: out, width, height}
}

// RGBA pixels -> float32 `(3, h, w)`, as `settings` (of web_config.json, `image`) wants them
export function pixels(picture, settings) {
  const [h, w] = settings.size
  let p = rgb(picture)
  if (settings.resize_mode === 'squash') p = resize(p, w, h, settings.interpolation)
  else {
    const short = Math.min(p.width, p.height)
    const side = v => v === short ? h : Math.trunc(h * v / short)
    p = resize(p, side(p.width), side(p.height), settings.interpolation)
  }
  const left = even((p.width - w) / 2), top = even((p.height - h) / 2)
  const out = new Float32Array(3 * h * w)
  for (let c = 0; c < 3; c++) {
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        const v = Math.fround(p.data[((y + top) * p.width + x + left) * 3 + c] / 255)
        out[(c * h + y) * w + x] = Math.fround(v - Math.fround(settings.mean[c])) / Math.fround(settings.std[c])
      }
    }
  }
  return out
}

const models = {}  // name -> {config, image, text}

// A file as bytes; `said(n)` after every piece of n bytes
async function fetched(url, said) {
  const answer = await fetch(url)
  if (!answer.ok) throw Error(`${url} cannot be read (${answer.status} ${answer.statusText})`)
  const reader = answer.body.getReader(), parts = []
  for (;;) {
    const {done, value} = await reader.read()
    if (done) break
    parts.push(value)
    said(value.length)
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer())
}

const does = {
  async runtime({url}, said) {
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1
    ort.env.wasm.wasmBinary = (await fetched(url, said)).buffer
  },
  async load({name, config, files}, said) {
    const model = {config}
    for (const kind of ['image', 'text']) {
      model[kind] = await ort.InferenceSession.create(await fetched(files[kind], said), {executionProviders: ['wasm']})
    }
    models[name] = model
  },
  async image({name, picture}) {
    const {config, image} = models[name]
    const x = new ort.Tensor('float32', pixels(picture, config.image), [1, 3, ...config.image.size])
    return rows(await image.run({[config.image.input]: x}))
  },
  async text({name, ids, mask, dims}) {
    const {text} = models[name]
    const feeds = {input_ids: new ort.Tensor('int64', ids, dims), attention_mask: new ort.Tensor('int64', mask, dims)}
    return rows(await text.run(feeds))
  },
}

const rows = out => Object.values(out)[0].data

let turn = Promise.resolve()  // one thing at a time: a session is not to be entered twice
self.onmessage = ({data: {id, does: what, ...given}}) => {
  turn = turn.then(async () => {
    try {
      const done = await does[what](given, bytes => self.postMessage({id, bytes}))
      self.postMessage({id, done})
    } catch (e) {
      self.postMessage({id, failed: e.message ?? String(e)})
    }
  })
}
