-- page.lua: a pandoc filter for a page of the book: names of code become links to their lines in
-- source/, links to pages of Markdown lead to those of the book, and Mermaid's drawings become
-- rows of boxes.
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
  if #code.text < 25 then code.classes = {"short"} end
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

-- Of each line "a -->|label| b" or "a->>b: label" a row of boxes and arrows.
local function draw(text)
  local names, rows = {}, {}
  local function escape(s) return (s:gsub("&", "&amp;"):gsub("<", "&lt;")) end
  local function caption(s) rows[#rows + 1] = "<p>" .. escape(s) .. "</p>" end
  for line in text:gmatch("[^\n]+") do
    local id, name = line:match("participant (%w+) as (.*)")
    local note = line:match("Note over .-: (.*)") or line:match('subgraph "?([^"]*)')
    if id then
      names[id] = name:gsub(" %(.*", "")
      caption(name)
    elseif note then caption(note)
    else
      line = line:gsub("(%w+)%->>(%w+): (.*)", "%1 -->|%3| %2")
        :gsub('(%w+)[%[%(]+"([^"]*)"[%]%)]+', function(id, name)
          names[id] = name
          return id
        end)
      local row, rest, boxes = "", line, 0
      repeat
        local id, arrow, after = rest:match("^%s*(%w+)%s*([%-%.>]*)(.*)")
        if not id or id == "graph" or id == "end" or id == "sequenceDiagram" then break end
        local label, tail = after:match('^|"?([^|"]*)"?|(.*)')
        row = row .. " <b>" .. escape(names[id] or id) .. "</b>"
        boxes = boxes + 1
        if arrow ~= "" then
          local head = arrow:match(">") and " →" or " —"
          row = row .. " <i>" .. escape(label or "") .. head .. "</i>"
        end
        rest = tail or after
      until arrow == ""
      if boxes > 1 then rows[#rows + 1] = "<div>" .. row .. "</div>" end
    end
  end
  return '<div class="drawing">' .. table.concat(rows, "\n") .. "</div>"
end

function CodeBlock(block)
  if block.classes[1] == "mermaid" then return pandoc.RawBlock("html", draw(block.text)) end
end

-- a cell with a sentence is not squeezed
function Plain(text)
  if #pandoc.utils.stringify(text) > 40 then
    return pandoc.Plain({pandoc.Span(text.content, {class = "long"})})
  end
end

-- links last, so that the names inside of them are links already
return {{Code = Code, CodeBlock = CodeBlock, Plain = Plain}, {Link = Link}}
