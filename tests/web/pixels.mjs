// Asks the page's worker for the pixels of pictures: node pixels.mjs WORKER REQUEST, where WORKER is worker.js without
// its import and REQUEST a JSON file of `settings`, `width`, `height`, `rgba` (base64); answers in JSON
import {readFileSync} from 'node:fs'

globalThis.self = globalThis
const {pixels} = await import(process.argv[2])
const said = JSON.parse(readFileSync(process.argv[3])).map(({settings, width, height, rgba}) =>
  [...pixels({data: Uint8Array.from(Buffer.from(rgba, 'base64')), width, height}, settings)])
process.stdout.write(JSON.stringify(said))
