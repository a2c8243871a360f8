// compare.cpp: what `make compare` ends with. Reads the metrics that the jobs of tests/compare.sh
// wrote, checks them (equal losses; bytes and memory equal to their formulas), prints three tables
// and writes the report: one HTML file, no network.
//   compare DIR REPORT.html    DIR has jobs.txt (lines: name, tab, ranks, tab, options) and for
//                              each job NAME.jsonl, and its replay NAME.html. How much slow links
//                              slow a step is in build/network/cells.tsv, if `make network` ran.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "comm.h"
#include "report/draw_schedule.h"

namespace {

using Json = nlohmann::json;

struct Job {
  std::string name, options, replay;  // the page of its replay, empty if there is none
  int ranks = 1;
  std::vector<double> losses, step_ms;
  Json summary;
};

const char* const kPersistent[] = {"parameters", "gradients", "optimizer"};

double mib(double bytes) { return bytes / 1048576; }

// ---- reading

std::vector<Job> read_jobs(const std::string& dir) {
  std::vector<Job> jobs;
  std::ifstream list(dir + "/jobs.txt");
  for (std::string line; std::getline(list, line);) {
    Job job;
    std::istringstream fields(line);
    std::string ranks;
    std::getline(fields, job.name, '\t'), std::getline(fields, ranks, '\t'),
        std::getline(fields, job.options);
    job.ranks = std::stoi(ranks);
    std::ifstream metrics(dir + "/" + job.name + ".jsonl");
    for (std::string l; std::getline(metrics, l);) {
      const Json record = Json::parse(l);
      if (record.contains("summary")) job.summary = record;
      else
        job.losses.push_back(record["loss"].get<double>()),
            job.step_ms.push_back(record["step_ms"].get<double>());
    }
    REQUIRE(!job.summary.is_null() && job.losses.size() > 2, dir, "/", job.name,
            ".jsonl is not there or not complete: run make compare");
    if (std::filesystem::exists(dir + "/" + job.name + ".html"))
      job.replay = std::filesystem::path(dir).filename() / (job.name + ".html");
    jobs.push_back(job);
  }
  REQUIRE(!jobs.empty() && jobs[0].name == "serial", dir,
          "/jobs.txt does not begin with the job 'serial'");
  return jobs;
}

// ---- what a job shows

double median_ms(const Job& j) {
  std::vector<double> all(j.step_ms.begin() + 1, j.step_ms.end());
  std::nth_element(all.begin(), all.begin() + long(all.size() / 2), all.end());
  return all[all.size() / 2];
}

double difference(const Job& j, const Job& serial) {
  REQUIRE(j.losses.size() == serial.losses.size(), j.name, " has ", j.losses.size(),
          " steps, serial ", serial.losses.size());
  double d = 0;
  for (size_t i = 0; i < j.losses.size(); i++)
    d = std::max(d, std::abs(j.losses[i] - serial.losses[i]) / serial.losses[i]);
  return d;
}

const Json& fullest(const Job& j) {
  const Json& all = j.summary["memory"];
  return *std::max_element(all.begin(), all.end(),
                           [](const Json& a, const Json& b) { return a["peak"] < b["peak"]; });
}
double of(const Json& rank, const char* category, const char* when) {
  return mib(rank[category].value(when, 0.0));
}

struct Sent {
  std::map<std::string, double> axis;
  double all = 0, calls = 0;
};  // bytes a step
Sent sent(const Job& j, int rank, const char* which = "bytes") {
  Sent s;
  const double steps = double(j.losses.size());
  for (const Json& row : j.summary["traffic"])
    if (row["rank"] == rank) {
      const double bytes = row.value(which, 0.0) / steps;
      s.axis[row["axis"]] += bytes, s.all += bytes, s.calls += row["calls"].get<double>() / steps;
    }
  return s;
}
int busiest(const Job& j) {
  int rank = 0;
  for (int r = 1; r < j.ranks; r++)
    if (sent(j, r).all > sent(j, rank).all) rank = r;
  return rank;
}

// Numbers that are not what their formula says, on any rank.
int differing(const Job& j) {
  int count = 0;
  for (const Json& rank : j.summary["memory"]) {
    for (const char* category : kPersistent)
      count += rank[category]["now"] != rank[category]["predicted"];
    count += rank["kept_activations"]["bytes"] != rank["kept_activations"]["predicted_bytes"];
  }
  for (const Json& row : j.summary["traffic"])
    count += !row.contains("predicted_bytes") || row["bytes"] != row["predicted_bytes"];
  return count;
}

std::string share(const Job& j) {
  if (j.ranks == 1) return "-";
  const auto& all = j.summary["communication_share"];
  const auto [low, high] = std::minmax_element(all.begin(), all.end());
  return format("%.0f to %.0f %%", 100 * low->get<double>(), 100 * high->get<double>());
}

bool has_pipeline(const Job& j) { return j.summary.contains("pipeline"); }
Schedule schedule_of(const Job& j) {
  const Json& p = j.summary["pipeline"];
  return make_schedule(p["schedule"], p["stages"], p["microbatches"], p["chunks"]);
}
std::string bubble(const Job& j, const char* which) {
  if (!has_pipeline(j)) return "-";
  return format("%.1f %%", 100 * (which ? j.summary["pipeline"][which].get<double>()
                                        : theoretical_bubble(schedule_of(j))));
}

// ---- tables: the same cells as text and as HTML

struct Table {
  std::string title;
  std::vector<std::string> head;
  std::vector<std::vector<std::string>> rows;
};

std::vector<Table> tables(const std::vector<Job>& jobs) {
  const Job& serial = jobs[0];
  Table time{sentence("The same loss after ", serial.losses.size(), " steps"),
             {"strategy", "ranks", "loss", "difference from serial", "ms per step",
              "time communicating", "bubble executed", "bubble predicted", "bubble if F = B = W"},
             {}};
  Table memory{
      "Memory of the fullest rank, MiB; and how many numbers of any rank differ from their formula",
      {"strategy", "parameters", "gradients", "optimizer", "kept activations", "all at the peak",
       "differ from formula"},
      {}};
  Table traffic{"Sent by the busiest rank per step, MiB", {"strategy"}, {}};
  std::vector<std::string> axes = names_of(kAxes);
  axes.push_back("world");  // the norm's sum
  std::vector<std::string> columns = axes;
  columns.insert(columns.end(), {"all", "by formula", "calls"});
  traffic.head.insert(traffic.head.end(), columns.begin(), columns.end());
  for (const Job& j : jobs) {
    time.rows.push_back({j.name, sentence(j.ranks), format("%.5f", j.losses.back()),
                         &j == &serial ? "-" : format("%.1e", difference(j, serial)),
                         format("%.0f", median_ms(j)), share(j), bubble(j, "bubble"),
                         bubble(j, "predicted_bubble"), bubble(j, nullptr)});
    const Json& m = fullest(j);
    memory.rows.push_back({j.name, format("%.2f", of(m, "parameters", "now")),
                           format("%.2f", of(m, "gradients", "now")),
                           format("%.2f", of(m, "optimizer", "now")),
                           format("%.2f", mib(m["kept_activations"]["bytes"].get<double>())),
                           format("%.2f", mib(m["peak"].get<double>())), sentence(differing(j))});
    const Sent s = sent(j, busiest(j));
    std::vector<std::string> row{j.name};
    for (const std::string& axis : axes)
      row.push_back(s.axis.count(axis) ? format("%.3f", mib(s.axis.at(axis))) : "-");
    row.insert(row.end(), {format("%.3f", mib(s.all)),
                           format("%.3f", mib(sent(j, busiest(j), "predicted_bytes").all)),
                           format("%.0f", s.calls)});
    traffic.rows.push_back(row);
  }
  return {time, memory, traffic};
}

void print(const Table& t) {
  printf("\n%s\n", t.title.c_str());
  std::vector<size_t> widths;
  for (size_t c = 0; c < t.head.size(); c++) {
    widths.push_back(t.head[c].size());
    for (const auto& row : t.rows) widths[c] = std::max(widths[c], row[c].size());
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    for (size_t c = 0; c < cells.size(); c++)
      printf(c ? "  %*s" : "  %-*s", int(widths[c]), cells[c].c_str());
    printf("\n");
  };
  line(t.head);
  for (const auto& row : t.rows) line(row);
}

// ---- the report

std::string html(const Table& t) {
  std::string s = "<div class=scroll tabindex=0 role=region aria-label='" + t.title +
                  "'><table><caption>" + t.title + "</caption><thead><tr>";
  for (const auto& cell : t.head) s += "<th scope=col>" + cell;
  s += "<tbody>";
  for (const auto& row : t.rows) {
    s += "<tr><th scope=row>" + row[0];
    for (size_t c = 1; c < row.size(); c++) s += "<td>" + row[c];
  }
  return s + "</table></div>\n";
}

const char* const kColours[] = {"c0", "c1", "c2", "c3", "c4", "c5", "c6"};

// Three names a row, each after a square of its colour; 17 high a row.
std::string legend(const std::vector<std::string>& names) {
  std::ostringstream svg;
  for (size_t i = 0; i < names.size(); i++)
    svg << "<rect x='" << 8 + 116 * (i % 3) << "' y='" << 4 + 17 * (i / 3)
        << "' width='10' height='10' class='" << kColours[i] << "'/><text x='" << 22 + 116 * (i % 3)
        << "' y='" << 13 + 17 * (i / 3) << "'>" << names[i] << "</text>\n";
  return svg.str();
}
std::string figure(const std::string& title, double height, const std::string& svg) {
  return sentence("<figure><figcaption>", title, "</figcaption><svg viewBox='0 0 360 ", height,
                  "' role='img'><title>", title, "</title>\n", svg, "</svg></figure>\n");
}

// A round number near x: 1, 2 or 5 times a power of ten
double round_step(double x) {
  if (x <= 0) return 1;
  const double power = std::pow(10, std::floor(std::log10(x)));
  return power * (x / power >= 5 ? 5 : x / power >= 2 ? 2 : 1);
}

// Bars, one a row or two: the second is what the formula says. Parts are stacked; the number at the
// end is their sum.
struct Bar {
  std::string label;
  std::vector<double> parts, predicted;
};
std::string bars(const std::string& title, const std::string& unit,
                 const std::vector<std::string>& parts, const std::vector<Bar>& all) {
  double most = 1e-9;
  for (const Bar& b : all)
    for (const auto* values : {&b.parts, &b.predicted}) {
      double sum = 0;
      for (double v : *values) sum += v;
      most = std::max(most, sum);
    }
  const double left = 108, wide = 174, row = 31, top = 44, bottom = top + row * double(all.size()),
               step = round_step(most / 3);
  std::ostringstream svg;
  svg << legend(parts);
  for (double x = 0; x <= most * 1.0001; x += step)
    svg << "<line class=grid x1='" << left + x / most * wide << "' x2='" << left + x / most * wide
        << "' y1='" << top - 4 << "' y2='" << bottom << "'/><text class=mid x='"
        << left + x / most * wide << "' y='" << bottom + 14 << "'>" << x << "</text>\n";
  svg << "<text class=mid x='" << left + wide / 2 << "' y='" << bottom + 32 << "'>" << unit
      << "</text>\n";
  for (size_t i = 0; i < all.size(); i++) {
    const double y = top + row * double(i);
    svg << "<text class=end x='" << left - 6 << "' y='" << y + 15 << "'>" << all[i].label
        << "</text>";
    for (int second = 0; second < 2; second++) {
      const auto& values = second ? all[i].predicted : all[i].parts;
      double x = 0;
      for (size_t p = 0; p < values.size(); p++) {
        svg << "<rect class='" << kColours[p] << (second ? " formula" : "") << "' x='"
            << left + x / most * wide << "' y='" << y + second * 12 << "' width='"
            << values[p] / most * wide << "' height='11'><title>" << all[i].label << ", "
            << parts[p] << (second ? " by formula: " : ": ") << values[p] << " " << unit
            << "</title></rect>";
        x += values[p];
      }
      svg << "<text class=small x='" << left + x / most * wide + 3 << "' y='" << y + second * 12 + 9
          << "'>"
          << format(x >= 100 ? "%.0f"
                    : x >= 1 ? "%.1f"
                             : "%.3f",
                    x)
          << (second ? " formula" : "") << "</text>\n";
    }
  }
  return figure(title, bottom + 42, svg.str());
}

struct Line {
  std::string name;
  std::vector<double> y;
};
// Over steps; the first lines are drawn widest, so that equal ones all show. Names that begin
// alike, up to a hyphen, share a colour.
std::string lines(const std::string& title, const std::string& y_title,
                  const std::vector<Line>& all) {
  std::vector<std::string> families;
  const auto family = [&](const Line& l) {
    const auto at = std::find(families.begin(), families.end(), l.name.substr(0, l.name.find('-')));
    return size_t(at - families.begin());
  };
  for (const Line& l : all)
    if (family(l) == families.size()) families.push_back(l.name.substr(0, l.name.find('-')));
  double low = 1e30, high = 0;
  for (const Line& l : all)
    for (double v : l.y) low = std::min(low, v), high = std::max(high, v);
  const size_t n = all[0].y.size();
  const double left = 48, wide = 296, tall = 180, step = round_step((high - low) / 4),
               top = 28 + 17 * double((families.size() + 2) / 3);
  const auto x = [&](size_t k) { return left + wide * double(k) / double(n - 1); };
  const auto y = [&](double v) { return top + tall * (high - v) / std::max(high - low, 1e-300); };
  std::ostringstream svg;
  svg << legend(families) << "<text x='4' y='" << top - 12 << "'>" << y_title << "</text>\n";
  for (double v = std::ceil(low / step) * step; v <= high * (1 + 1e-9); v += step)
    svg << "<line class=grid x1='" << left << "' x2='" << left + wide << "' y1='" << y(v)
        << "' y2='" << y(v) << "'/><text class=end x='" << left - 5 << "' y='" << y(v) + 4 << "'>"
        << format("%.3g", v) << "</text>\n";
  for (size_t k = 0; k < n; k += std::max<size_t>(1, n / 5))
    svg << "<text class=mid x='" << x(k) << "' y='" << top + tall + 16 << "'>" << k + 1
        << "</text>";
  svg << "<text class=mid x='" << left + wide / 2 << "' y='" << top + tall + 34
      << "'>step</text>\n";
  for (size_t i = 0; i < all.size(); i++) {
    svg << "<polyline class='l" << family(all[i]) << "' stroke-width='"
        << 7 - 6.0 * double(i) / double(all.size()) << "' points='";
    for (size_t k = 0; k < n; k++) svg << x(k) << "," << y(all[i].y[k]) << " ";
    svg << "'><title>" << all[i].name << "</title></polyline>\n";
  }
  return figure(title, top + tall + 40, svg.str());
}

std::string curves(const std::vector<Job>& jobs) {
  std::vector<Line> losses, differences;
  double worst = 0;
  for (const Job& j : jobs) {
    losses.push_back({j.name, j.losses});
    std::vector<double> d;
    for (size_t i = 0; i < j.losses.size(); i++)
      d.push_back(1e7 * std::abs(j.losses[i] - jobs[0].losses[i]) / jobs[0].losses[i]);
    differences.push_back({j.name, d});
    worst = std::max(worst, difference(j, jobs[0]));
  }
  if (jobs.size() == 1) return lines("The loss of one rank", "loss, nats per token", losses);
  return lines(sentence("Loss: ", jobs.size(),
                        " curves on top of each other, the first ones drawn widest"),
               "loss, nats per token", losses) +
         lines(format("How far each is from serial: %.1e at most, the rounding of f32", worst),
               "relative difference of the loss, in units of 1e-7", differences);
}

std::string link(const Job& j) {
  return j.replay.empty() ? "" : " <a href='" + j.replay + "'>replay of " + j.name + "</a>";
}

// All pipelines on one scale of time: a shorter step is a shorter drawing.
std::string timelines(const std::vector<Job>& jobs) {
  struct Drawn {
    const Job& job;
    Schedule schedule;
    Timeline executed;
  };
  std::vector<Drawn> all;
  double longest = 0;
  for (const Job& j : jobs) {
    if (!has_pipeline(j) || !j.summary["pipeline"].contains("took_ms")) continue;
    const Schedule schedule = schedule_of(j);
    const Durations took = j.summary["pipeline"]["took_ms"];
    all.push_back({j, schedule, simulate(schedule, took)});
    longest = std::max(longest, all.back().executed.makespan);
  }
  std::string s;
  for (const auto& [j, schedule, executed] : all) {
    const std::string title = j.name + ": bubble " + bubble(j, "bubble") + " executed, " +
                              bubble(j, "predicted_bubble") + " predicted from mean times, " +
                              bubble(j, nullptr) + " if F = B = W";
    s += "<div class=scroll tabindex=0 role=region aria-label='timeline of " + j.name + "'>" +
         draw_svg(schedule, executed, title, "ms", longest) + "</div>" + link(j) + "\n";
  }
  return s;
}

const Job* find(const std::vector<Job>& jobs, const std::string& name) {
  for (const Job& j : jobs)
    if (j.name == name) return &j;
  return nullptr;
}

const char* const kNotMeasured = "not measured here";

// How many times slower a step is over slow links, from the lines of `make network`: ranks a node,
// link, layout, ms.
std::string slowdowns(const std::string& layout) {
  std::map<std::string, double> ms;
  std::ifstream cells("build/network/cells.tsv");
  for (std::string line; std::getline(cells, line);) {
    std::istringstream fields(line);
    std::string ranks, link, name;
    double of_step = 0;
    if (fields >> ranks >> link >> name >> of_step && ranks == "1" && name == layout)
      ms[link] = of_step;
  }
  std::string s;
  for (const char* link : {"1gbit", "300mbit", "100mbit", "1ms"})
    if (ms.count("fast") && ms.count(link))
      s += format(s.empty() ? "a step takes %.2f times as long over %s" : ", %.2f over %s",
                  ms[link] / ms["fast"], link);
  return s.empty() ? kNotMeasured : s;
}

// What each strategy promises, what it asks of the network and when to use it, each with what was
// measured here.
std::string promises(const std::vector<Job>& jobs, const std::map<std::string, double>& token_ms) {
  const Job& serial = jobs[0];
  const auto state = [](const Job& j) {
    double all = 0;
    for (const char* category : kPersistent) all += of(fullest(j), category, "now");
    return all;
  };
  const auto weights = [](const Job& j) { return of(fullest(j), "parameters", "now"); };
  const auto sends = [&](const Job& j) {
    const Sent s = sent(j, busiest(j));
    return format("%.2f MiB per step and rank in %.0f calls", mib(s.all), s.calls);
  };
  Table t{"What each strategy is for and what it asks of the network, with what was measured here",
          {"strategy", "what it is for", "what it is like", "what it asks of the network",
           "over slow links (make network)", "when to use it"},
          {}};
  // Words, each followed by what was measured of the job: nothing, where it did not run.
  const auto row = [&](const char* name, const char* of_job, const char* layout, const char* for_,
                       const auto& benefit, const char* like, const auto& likewise,
                       const char* network, const char* when) {
    const Job* j = find(jobs, of_job);
    const auto cell = [&](const char* words, const auto& measured) {
      return std::string(words) + ": " + (j ? measured(*j) : kNotMeasured) + ".";
    };
    t.rows.push_back({name + (j ? link(*j) : ""), cell(for_, benefit), cell(like, likewise),
                      cell(network, sends), slowdowns(layout), when});
  };
  const auto held = [&](const Job& j) {
    return format(
        "a rank holds %.2f MiB of weights, gradients and optimizer state; alone it would hold "
        "%.2f MiB, %.2f times as much",
        state(j), state(serial), state(serial) / state(j));
  };
  const auto weights_of = [&](const char* each) {
    return [&, each](const Job& j) {
      return sentence("each of ", j.ranks, each,
                      format(" %.2f of %.2f MiB of weights", weights(j), weights(serial)));
    };
  };
  row(
      "Data parallel (DDP)", "replicate", "replicate", "Speed, with a whole model on each rank",
      [&](const Job& j) {
        return format("a rank holds %.2f MiB of weights, gradients and optimizer state, as alone",
                      state(j));
      },
      "Copies of a book, each reads other pages",
      [&](const Job& j) {
        return format("%.2f MiB of weights on each of %d", weights(j), j.ranks);
      },
      "Moderate, all-reduce", "The model fits on one GPU, and training is slow");
  row("FSDP", "fsdp-zero3", "zero3", "Memory", held, "A large book cut in slices",
      weights_of(" people keeps"), "Moderate, all-gather and reduce-scatter",
      "The model does not fit on one GPU: its optimizer state is too large");
  row(
      "Tensor parallel", "tp", "tp", "Latency",
      [&](const Job&) {
        return token_ms.count("tp")
                   ? format(
                         "one token of gpt2 takes %.2f ms on one rank and %.2f ms with --tp 2, "
                         "which is %.2f times as fast",
                         token_ms.at("one"), token_ms.at("tp"),
                         token_ms.at("one") / token_ms.at("tp"))
                   : std::string(kNotMeasured) + " (ONLY=generate)";
      },
      "People on different parts of one problem", weights_of(" multiplies with"),
      "Extremely high, everyone waits for each all-reduce (NVLink)",
      "The lowest latency of a token is needed (inference)");
  row(
      "Pipeline", "pp-1f1b", "1f1b", "Throughput",
      [&](const Job& j) {
        return format("busy %.1f %% of the time with 1f1b, by formula %.1f %%",
                      100 - 100 * j.summary["pipeline"]["bubble"].get<double>(),
                      100 - 100 * theoretical_bubble(schedule_of(j)));
      },
      "An assembly line",
      [&](const Job& j) {
        return format("each of %d people adds 1/%d of the layers", j.ranks, j.ranks);
      },
      "Lower, an activation at each cut", "The model is very deep, and spans several nodes");
  row("All three (3D)", "3d", "3d", "Very large models", held,
      "Assembly lines whose workers share each task", weights_of(" holds"),
      "Each axis its own: tp inside a node, pp between nodes", "100 billion parameters and more");
  return "<div class=words>" + html(t) + "</div>";
}

const char* const kStyle = R"(<style>
:root { --paper:#fff; --ink:#1c1e21; --soft:#5c6670; --grid:#dde1e6; --c0:#0072b2;
  --c1:#d55e00; --c2:#cc79a7; --c3:#009e73; --c4:#e69f00; --c5:#555555; --c6:#56b4e9;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper:#15181c; --ink:#e7e9ec; --soft:#a3acb5;
  --grid:#343a41; --c5:#aaa; } }
body { margin:0 auto; padding:1rem; max-width:1240px; background:var(--paper);
  color:var(--ink); font:16px/1.5 system-ui,sans-serif; }
h1 { font-size:1.6rem; margin:.2em 0; } h2 { font-size:1.2rem; margin:2em 0 .5em; }
p, li { max-width:70ch; } pre { overflow-x:auto; }
nav a { display:inline-block; margin-right:1em; padding:.4em 0; }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));
  gap:1.5rem; }
figure { margin:0; min-width:0; }
figure svg { display:block; width:100%; max-width:600px; height:auto; }
.scroll svg { max-width:none; }
figcaption { font-size:.9rem; font-weight:600; max-width:600px; min-height:3em; }
svg text { font:11px system-ui,sans-serif; fill:var(--ink); } svg .small { font-size:9px; }
svg .mid { text-anchor:middle; } svg .end { text-anchor:end; } svg .grid { stroke:var(--grid); }
.c0 { fill:var(--c0); } .c1 { fill:var(--c1); } .c2 { fill:var(--c2); } .c3 { fill:var(--c3); }
.c4 { fill:var(--c4); } .c5 { fill:var(--c5); } .c6 { fill:var(--c6); }
.formula { fill-opacity:.45; }
polyline { fill:none; } .l0 { stroke:var(--c0); } .l1 { stroke:var(--c1); }
.l2 { stroke:var(--c2); } .l3 { stroke:var(--c3); } .l4 { stroke:var(--c4); }
.l5 { stroke:var(--c5); } .l6 { stroke:var(--c6); }
.scroll { overflow-x:auto; margin:1rem 0; }
.scroll:focus-visible, a:focus-visible { outline:2px solid var(--c0); outline-offset:2px; }
table { border-collapse:collapse; font-size:.9rem; }
caption { text-align:left; font-weight:600; padding:.3em 0; }
th, td { padding:.3em .7em; border-bottom:1px solid var(--grid); text-align:right;
  vertical-align:top; }
th:first-child { text-align:left; }
thead th { color:var(--soft); font-weight:500; vertical-align:bottom; }
tbody th, td { white-space:nowrap; } .words tbody th, .words td { white-space:normal; }
.words td { text-align:left; min-width:14em; } .words thead th { text-align:left; }
code { font-size:.9em; overflow-wrap:anywhere; }
@media print { body { max-width:none; font-size:11px; } nav { display:none; }
  h2 { break-after:avoid; } figure, table, .scroll { break-inside:avoid; }
  pre { white-space:pre-wrap; } .scroll { overflow:visible; }
  .cards { grid-template-columns:1fr 1fr; }
  figcaption { font-size:11px; } table { font-size:10px; } .words td { min-width:0; }
  th, td { white-space:normal; padding:.2em .5em; } .scroll svg { width:100%; height:auto; } }
</style>
)";

// What `make network` measured, where it has run: a chart a link.
std::string network() {
  std::ifstream table("build/network/table.txt"), cells("build/network/cells.tsv");
  std::map<std::string, double> fast[2];  // ms, measured and predicted, by ranks and layout
  std::vector<std::pair<std::string, std::vector<Bar>>> charts;
  for (std::string line; std::getline(cells, line);) {
    std::istringstream words(line);
    std::string ranks, link, layout;
    double ms, predicted, ledger, wire;
    if (!(words >> ranks >> link >> layout >> ms >> predicted >> ledger >> wire)) continue;
    const std::string name = layout + (ranks == "1" ? "" : " x " + ranks);
    if (link == "fast") {
      fast[0][name] = ms;
      fast[1][name] = predicted;
    }
    if (!fast[0].count(name)) continue;  // its cells over the fast link failed
    auto chart =
        std::find_if(charts.begin(), charts.end(), [&](const auto& c) { return c.first == link; });
    if (chart == charts.end()) chart = charts.insert(chart, {link, {}});
    chart->second.push_back({name, {ms / fast[0][name]}, {predicted / fast[1][name]}});
  }
  std::string s;
  for (const auto& [link, all] : charts)
    if (link != "fast" && link != "again")
      s += bars("A step over " + link, "times slower", {"measured"}, all);
  if (s.empty()) return s;
  std::ostringstream text;
  text << table.rdbuf();
  return "<p>Two nodes, one rank a node (x 2: two ranks), joined by links of a chosen speed: how "
         "many times slower a step is than over a fast one, measured, and below it what the "
         "planner predicts from a calibration.</p><div class=cards>" +
         s + "</div><pre>" + text.str() + "</pre>";
}

std::string report(const std::vector<Job>& jobs, const std::vector<Table>& all,
                   const std::map<std::string, double>& token_ms, const std::string& common,
                   const std::string& device) {
  std::vector<Bar> memory, traffic;
  const std::vector<std::string> categories{"parameters",  "gradients",      "optimizer",
                                            "activations", "gather buffers", "workspace"};
  for (const Job& j : jobs) {
    const Json& m = fullest(j);
    Bar bar{j.name, {}, {}};
    for (const auto& c : categories) bar.parts.push_back(of(m, c.c_str(), "at_peak"));
    for (const char* c : kPersistent) bar.predicted.push_back(of(m, c, "predicted"));
    bar.predicted.push_back(mib(m["kept_activations"]["predicted_bytes"].get<double>()));
    memory.push_back(bar);
    if (j.ranks == 1) continue;
    bar = {j.name, {}, {}};
    const Sent got = sent(j, busiest(j)), formula = sent(j, busiest(j), "predicted_bytes");
    for (const std::string& axis : names_of(kAxes)) {
      bar.parts.push_back(got.axis.count(axis) ? mib(got.axis.at(axis)) : 0);
      bar.predicted.push_back(formula.axis.count(axis) ? mib(formula.axis.at(axis)) : 0);
    }
    traffic.push_back(bar);
  }
  std::string s =
      "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
      "content='width=device-width,initial-scale=1'><title>Threefold: strategies side by "
      "side</title>\n";
  s += kStyle;
  s += sentence(
      "<h1>One model, ", jobs.size(), jobs.size() == 1 ? " way" : " ways",
      " to train it</h1>\n<p>The same model, batch and seed as one process and with every strategy "
      "that runs here. <code>",
      common, "</code>; device: ", device,
      "; ranks that share cores or a GPU take turns, so compare times with that in mind.</p>\n");
  std::string tables_as_html, nav = "<nav aria-label=Sections>", body;
  for (const Table& t : all) tables_as_html += html(t);
  // left out where there is nothing to show
  const auto section = [&](const std::string& id, const std::string& title,
                           const std::string& content) {
    if (content.empty()) return;
    nav += "<a href='#" + id + "'>" + title + "</a>";
    body += "<h2 id=" + id + ">" + title + "</h2>" + content;
  };
  section("promises", "What each strategy promises", promises(jobs, token_ms));
  section("loss", "One curve", "<div class=cards>" + curves(jobs) + "</div>");
  section(
      "memory", "Memory and traffic, beside their formulas",
      "<div class=cards>" +
          bars(
              "Memory of the fullest rank at its peak; by formula: what is held between steps, and "
              "the activations kept for the backward",
              "MiB", categories, memory) +
          (traffic.empty() ? ""
                           : bars("Sent by the busiest rank per step, by mesh axis", "MiB per step",
                                  names_of(kAxes), traffic)) +
          "</div>");
  section("pipelines", "Pipelines as they ran", timelines(jobs));
  section("network", "Over slow links", network());
  section("numbers", "All numbers", tables_as_html);
  s += nav + "</nav>\n" + body;
  s += "<h2>The jobs</h2><ul>";
  for (const Job& j : jobs)
    s += sentence("<li><b>", j.name, "</b>: <code>mpiexec -n ", j.ranks, " build/train_gpt ",
                  common, " ", j.options, "</code>", link(j));
  return s + "</ul></html>\n";
}

int run(const std::string& dir, const std::string& path) {
  const std::vector<Job> jobs = read_jobs(dir);
  const std::vector<Table> all = tables(jobs);
  for (const Table& t : all) print(t);
  std::map<std::string, double> token_ms;
  std::ifstream tokens(dir + "/tokens.txt"), about(dir + "/about.txt");
  for (std::string name; tokens >> name;) tokens >> token_ms[name];
  if (token_ms.count("tp"))
    printf("\nOne token of gpt2: %.2f ms on one rank, %.2f with --tp 2, %.2f times as fast\n",
           token_ms["one"], token_ms["tp"], token_ms["one"] / token_ms["tp"]);
  std::string common, device;
  std::getline(about, common), std::getline(about, device);
  std::ofstream out(path);
  out << report(jobs, all, token_ms, common, device);
  out.close();
  REQUIRE(out, path, " cannot be written");
  double worst = 0;
  int differ = 0;
  for (const Job& j : jobs) worst = std::max(worst, difference(j, jobs[0])), differ += differing(j);
  printf(
      "\nlargest difference of a loss from serial %.1e (at most 1e-4), %d numbers differ from "
      "their formula; report: %s\n",
      worst, differ, path.c_str());
  return worst <= 1e-4 && differ == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  int status = 0;
  const int failed = run_main("compare", [&] {
    REQUIRE(argc == 3, "usage: compare DIR REPORT.html");
    status = run(argv[1], argv[2]);
  });
  return failed || status;
}
