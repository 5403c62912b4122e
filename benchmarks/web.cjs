// Rows of pictures and texts from transformers.js: node web.cjs REQUEST, where REQUEST is a JSON file with `folder` (of
// `tinyclip export --to web`, a CLIP), `dtype`, `images` (paths), `texts`; answers in JSON
const fs = require('fs')
const {
  env, AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage,
} = require('@huggingface/transformers')

env.allowRemoteModels = false
env.useFSCache = false

async function main({folder, dtype, images, texts}) {
  const options = {dtype, device: 'cpu', session_options: {intraOpNumThreads: 1}}
  const tokenizer = await AutoTokenizer.from_pretrained(folder)
  const processor = await AutoProcessor.from_pretrained(folder)
  const image = await CLIPVisionModelWithProjection.from_pretrained(folder, options)
  const text = await CLIPTextModelWithProjection.from_pretrained(folder, options)
  const {text_embeds} = await text(tokenizer(texts, {padding: true, truncation: true}))
  const answer = {image: [], text: text_embeds.tolist()}
  for (const path of images) {
    const {pixel_values} = await processor(await RawImage.read(path))
    answer.image.push([...(await image({pixel_values})).image_embeds.data])
  }
  return answer
}

main(JSON.parse(fs.readFileSync(process.argv[2])))
  .then(a => process.stdout.write(JSON.stringify(a)))
  .catch(e => { console.error(e); process.exit(1) })
