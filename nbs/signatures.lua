-- nbdev links every name it knows between backticks, in the signatures of show_doc too, where a link cannot be one and is only noise.
-- Pages that explain show what came out: code that is longer than a glance opens when it is asked for.
local explains = (quarto.doc.input_file or ''):match('[/\\]explain[/\\]')
local GLANCE = 12 -- lines

function CodeBlock(block)
  block.text = block.text:gsub('%[(`[^`]+`)%]%(https?://[^%s)]*%)', '%1')
  local _, breaks = block.text:gsub('\n', '')
  if explains and breaks >= GLANCE and block.classes:includes('cell-code') and not block.attributes['code-fold'] then
    block.attributes['code-fold'] = 'true'
  end
  return block
end

-- A command in a sentence stays on one line where a phone has room for it.
local COMMAND = 30 -- characters

function Code(code)
  if #code.text <= COMMAND then code.classes:insert('brief') end
  return code
end

-- Options of the command line are no dashes: whoever searches for --data, or copies it, finds two hyphens.
function Str(word)
  if not word.text:find('%w–') then word.text = word.text:gsub('–(%l)', '--%1') end
  return word
end

-- A table's columns are as wide as what stands in them (pandoc shares the page out among the columns of a long one),
-- but for longer texts, which styles.css keeps readable; and only numbers stand at the right: names do not.
local BRIEF, SENTENCE = 18, 40 -- characters

local function length_of(said)
  if #said > SENTENCE then return 'sentence' end
  return #said > BRIEF and 'phrase' or 'brief'
end

local function is_number(text)
  local said = text:gsub('^[^%w]+', '')
  return said == '' or said:match('^%d') or said:match('^inf') or said:match('^nan')
end

function Table(t)
  local align = {}
  for i, spec in ipairs(t.colspecs) do align[i] = spec[1] end
  for _, body in ipairs(t.bodies) do
    for _, row in ipairs(body.body) do
      for i, cell in ipairs(row.cells) do
        local said = pandoc.utils.stringify(cell.contents)
        if align[i] == 'AlignRight' and not is_number(said) then align[i] = 'AlignLeft' end
        if said ~= '' then cell.contents = {pandoc.Div(cell.contents, {class = length_of(said)})} end
      end
    end
  end
  for i in ipairs(t.colspecs) do t.colspecs[i] = {align[i], nil} end
  return t
end
