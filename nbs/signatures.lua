-- nbdev links every name it knows between backticks, in the signatures of show_doc too, where a link cannot be one and is only noise.
function CodeBlock(block)
  block.text = block.text:gsub('%[(`[^`]+`)%]%(https?://[^%s)]*%)', '%1')
  return block
end
