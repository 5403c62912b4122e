// Asks transformers.js about a folder of `tinyclip export --to web`: node transformers_js.cjs REQUEST, where
// REQUEST is a JSON file with `folder`, `dtype`, `images` (paths), `texts`; answers in JSON
const fs = require('fs')
const {pipeline, env, AutoModel, AutoProcessor, AutoTokenizer, RawImage} = require('@huggingface/transformers')

env.allowRemoteModels = false
env.useFSCache = false

async function main({folder, dtype, images, texts}) {
  const options = {dtype, device: 'cpu'}
  const tokenizer = await AutoTokenizer.from_pretrained(folder)
  const processor = await AutoProcessor.from_pretrained(folder)
  const model = await AutoModel.from_pretrained(folder, options)
  const classify = await pipeline('zero-shot-image-classification', folder, options)
  const tokens = tokenizer(texts, {padding: true, truncation: true})
  const answer = {logits: [], scores: [], first: []}
  for (const path of images) {
    const {pixel_values} = await processor(await RawImage.read(path))
    const {logits_per_image} = await model({...tokens, pixel_values})
    answer.logits.push([...logits_per_image.data])
    const said = await classify(path, texts, {hypothesis_template: '{}'})
    answer.scores.push(texts.map(t => said.find(s => s.label === t).score))
  }
  answer.ids = tokens.input_ids.tolist().map(row => row.map(Number))
  return answer
}

main(JSON.parse(fs.readFileSync(process.argv[2])))
  .then(a => process.stdout.write(JSON.stringify(a)))
  .catch(e => { console.error(e); process.exit(1) })
