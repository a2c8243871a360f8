-- page.lua: a pandoc filter for a page of the book: names of code become links to their lines in
-- source/, and links to pages of Markdown lead to those of the book.
local page = PANDOC_STATE.input_files[1]
local places = {}
for line in io.lines(os.getenv("REFERENCES")) do
  local at, name, file, first, last = line:match("^(.-)\t(.-)\t(.-)\t(%d+)\t(%d+)$")
  if at == page then places[name] = {file, tonumber(first), tonumber(last)} end
end

local function link(content, place)
  local file, first, last = table.unpack(place)
  local target, title = "source/" .. file:gsub("/", "-") .. ".html", file
  if last > 0 then
    target = target .. "#" .. first .. "-" .. last
    title = file .. ":" .. first
  end
  return pandoc.Link(content, target, title, {class = "code", target = "code"})
end

function Code(code)
  local place = places[code.text]
  return place and link({code}, place) or code
end

function Link(l)
  local content = l.content:walk({Link = function(inner) return inner.content end})
  local place = places[l.target]
  if place then return link(content, place) end
  l.content = content
  if not l.target:match("^https?:") then
    l.target = l.target:gsub("^docs/", ""):gsub("^%.%./README%.md", "index.html")
      :gsub("%.md", ".html")
  end
  return l
end

-- a cell with a sentence is not squeezed
function Plain(text)
  if #pandoc.utils.stringify(text) > 40 then
    return pandoc.Plain({pandoc.Span(text.content, {class = "long"})})
  end
end

-- links last, so that the names inside of them are links already
return {{Code = Code, Plain = Plain}, {Link = Link}}
