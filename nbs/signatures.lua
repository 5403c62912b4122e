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

-- A table's columns are as wide as what stands in them (pandoc shares the page out among the columns of a long one),
-- and only numbers stand at the right: names do not.
local function is_number(text)
  local said = text:gsub('^[^%w]+', '')
  return said == '' or said:match('^%d') or said:match('^inf') or said:match('^nan')
end

function Table(t)
  for i, spec in ipairs(t.colspecs) do
    local align = spec[1]
    for _, body in ipairs(t.bodies) do
      for _, row in ipairs(body.body) do
        local cell = row.cells[i]
        if align == 'AlignRight' and cell and not is_number(pandoc.utils.stringify(cell.contents)) then
          align = 'AlignLeft'
        end
      end
    end
    t.colspecs[i] = {align, nil}
  end
  return t
end
