// SPDX-License-Identifier: MIT
// Shared code of the native benchmarks: options, interleaved timings, the peaks of the machine, and
// a report. Common options, each followed by a value:
//   --threads    number of threads; 0, the usual default: all of them, and fewer for small work
//   --precision  double, single or both
//   --repeats    number of timings of every peer
//   --json       file to which one line with the machine and one line per measurement are appended
//
// Rates use the median time. Fractions are relative to the peaks that the same process reached on
// the same number of threads:
//   arith  multiply-adds on registers only
//   gemm   the package's own `multiply` of 1024 x 1024 matrices
//   triad  a = b + s c on arrays larger than the caches, with two reads and one write per element.
//          The store first loads the overwritten cache line, which is not counted. Passes that only
//          read, updates in place, and work inside the caches can therefore exceed this peak.
// The peaks are measured again at the end. If they have changed, other programs used the machine.
// If it was busy all the time, the peaks are too low, and there is no warning.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "dlnfast/build_info.hpp"
#include "dlnfast/threads.hpp"
#include "peaks.hpp"

namespace bench {

using dlnfast::Context;

[[noreturn]] inline void refuse(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(2);
}

// The command line: pairs of --name and value. Reading an option registers its name.
class Options {
 public:
  Options(int argc, char** argv) {
    for (int i = 1; i < argc; i += 2) {
      if (i + 1 == argc) refuse(std::string(argv[i]) + " has no value");
      values_[argv[i]] = argv[i + 1];
    }
  }

  std::string text(const std::string& name, const std::string& fallback) {
    known_ += " " + name;
    const auto option = values_.extract(name);
    return option.empty() ? fallback : option.mapped();
  }

  // Returns a comma-separated list of integers.
  std::vector<Index> list(const std::string& name, std::vector<Index> fallback, Index least = 1) {
    const std::string value = text(name, "");
    if (value.empty()) return fallback;
    std::vector<Index> numbers;
    std::istringstream items(value);
    for (std::string item; std::getline(items, item, ',');) {
      char* end = nullptr;
      numbers.push_back(std::strtoll(item.c_str(), &end, 10));
      if (item.empty() || *end != '\0' || numbers.back() < least) {
        refuse(name + " is " + value + "; wanted integers of at least " + std::to_string(least));
      }
    }
    return numbers;
  }

  Index integer(const std::string& name, Index fallback, Index least = 1) {
    return list(name, {fallback}, least).back();
  }

  // Refuses options that were not read.
  void done() const {
    if (!values_.empty()) {
      refuse("unknown option " + values_.begin()->first + "; the options are" + known_);
    }
  }

 private:
  std::map<std::string, std::string> values_;
  std::string known_;
};

// One of the timed alternatives of a group.
struct Peer {
  std::string name;
  double flops = 0.0;  // per unit; 0: not counted
  double bytes = 0.0;
  std::function<void()> job;
  double units = 1.0;  // units of work per job; times are per unit
  int threads = 0;     // 0: the harness's
};

// Timings in seconds per unit.
struct Times {
  Index calls = 1;  // per timing
  std::vector<double> elapsed;
  std::vector<double> processor;  // of all threads together
};

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

// Doubles the calls per timing of each peer until a timing takes a few milliseconds, which also
// warms it up. Then times all peers once in every round.
inline std::vector<Times> time_interleaved(const std::vector<Peer>& peers, Index repeats) {
  constexpr double long_enough = 5e-3;
  std::vector<Times> times(peers.size());
  const auto time_once = [&](std::size_t p) {
    const std::clock_t processor_start = std::clock();
    const auto start = std::chrono::steady_clock::now();
    for (Index i = 0; i < times[p].calls; ++i) peers[p].job();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    const double processor = double(std::clock() - processor_start) / CLOCKS_PER_SEC;
    const double units = peers[p].units * double(times[p].calls);
    times[p].elapsed.push_back(elapsed.count() / units);
    times[p].processor.push_back(processor / units);
    return elapsed.count();
  };
  for (std::size_t p = 0; p < peers.size(); ++p) {
    while (time_once(p) < long_enough) times[p].calls *= 2;
    times[p].elapsed.clear();
    times[p].processor.clear();
  }
  for (Index round = 0; round < repeats; ++round) {
    for (std::size_t p = 0; p < peers.size(); ++p) time_once(p);
  }
  return times;
}

// Flops, flops and bytes per second of the multiply-adds, the gemm and the triad; 0: not measured.
using Peaks = std::array<double, 3>;

using Shape = std::vector<std::pair<std::string, Index>>;

class Harness {
 public:
  // Reads the common options, so the other options must have been read before.
  Harness(std::string name, Options& options, Index threads = 0) : name_(std::move(name)) {
    threads_ = static_cast<int>(options.integer("--threads", threads, 0));
    precision_ = options.text("--precision", "both");
    repeats_ = options.integer("--repeats", 9);
    const std::string path = options.text("--json", "");
    options.done();
    if (precision_ != "double" && precision_ != "single" && precision_ != "both") {
      refuse("--precision is " + precision_ + "; wanted double, single or both");
    }
    if (!path.empty()) {
      json_.open(path, std::ios::app);
      if (!json_) refuse("cannot write " + path);
    }
    const int wanted = threads_ > 0 ? threads_ : dlnfast::max_threads();
    dlnfast::parallel(wanted, [&](int member, int size) {
      if (member == 0) team_ = size;
    });
    describe_machine();
  }

  int threads() const { return threads_; }  // as requested
  int team() const { return team_; }

  // Calls body(T()) in each requested precision. Returns the exit status of the benchmark.
  template <class Body>
  int each_precision(const Body& body) {
    if (precision_ != "single") one_precision<double>(body);
    if (precision_ != "double") one_precision<float>(body);
    return check::result();
  }

  // Times a group of peers and reports them. Nothing is timed after a check has failed.
  template <class T>
  std::vector<Times> run(const Shape& shape, const std::vector<Peer>& peers) {
    if (check::failures > 0) std::exit(check::result());
    std::vector<Times> times = time_interleaved(peers, repeats_);
    for (std::size_t p = 0; p < peers.size(); ++p) report<T>(shape, peers[p], times[p]);
    return times;
  }

 private:
  template <class T, class Body>
  void one_precision(const Body& body) {
    std::printf("\n%-49s%4s%11s%11s%11s%9s%9s%8s%8s%8s\n",
                sizeof(T) == 4 ? "single precision" : "double precision", "thr", "median", "least",
                "most", "GFLOP/s", "GB/s", "arith", "gemm", "triad");
    peaks_ = {};
    const Peaks before = measure_peaks<T>();
    peaks_ = before;
    body(T());
    const Peaks after = measure_peaks<T>();
    for (std::size_t i = 0; i < before.size(); ++i) {
      if (std::abs(after[i] / before[i] - 1.0) < 0.1) continue;
      std::printf("a peak changed by more than 10 %%: other programs used the machine\n");
      break;
    }
  }

  template <class T>
  Peaks measure_peaks() {
    PeakWork<T> work(team_);
    const std::vector<Peer> peers{
        {"peak: multiply-add", work.multiply_add_flops(), 0.0, [&] { work.multiply_adds(); }},
        {"peak: gemm", work.gemm_flops, 0.0, [&] { work.gemm(); }},
        {"peak: triad", 0.0, work.triad_bytes, [&] { work.triad(); }}};
    const std::vector<Times> times = run<T>({}, peers);
    const auto least = [&](int p) {
      return *std::min_element(times[p].elapsed.begin(), times[p].elapsed.end());
    };
    return {peers[0].flops / least(0), peers[1].flops / least(1), peers[2].bytes / least(2)};
  }

  template <class T>
  void report(const Shape& shape, const Peer& peer, const Times& times) {
    const int threads = peer.threads > 0 ? peer.threads : team_;
    const Peaks peaks = threads == team_ ? peaks_ : Peaks{};
    const double middle = median(times.elapsed);
    const auto [least, most] = std::minmax_element(times.elapsed.begin(), times.elapsed.end());
    const double flops = peer.flops / middle, bytes = peer.bytes / middle;
    const std::pair<const char*, double> values[] = {
        {"median_seconds", middle},
        {"min_seconds", *least},
        {"max_seconds", *most},
        {"median_processor_seconds", median(times.processor)},
        {"gflops", 1e-9 * flops},
        {"gbytes", 1e-9 * bytes},
        {"fraction_of_arithmetic", ratio(flops, peaks[0])},
        {"fraction_of_gemm", ratio(flops, peaks[1])},
        {"fraction_of_triad", ratio(bytes, peaks[2])}};
    std::string words = peer.name, members;
    for (const auto& [key, value] : shape) {
      words += " " + key + "=" + std::to_string(value);
      members += (members.empty() ? "" : ", ") + quoted(key) + ": " + std::to_string(value);
    }
    std::printf("%-49s%4d", words.c_str(), threads);
    for (int i : {0, 1, 2}) std::printf("%11s", duration(values[i].second).c_str());
    for (int i : {4, 5}) std::printf("%9s", number("%.2f", values[i].second, "-").c_str());
    for (int i : {6, 7, 8}) std::printf("%8s", number("%.3f", values[i].second, "-").c_str());
    std::printf("\n");
    std::fflush(stdout);
    if (!json_.is_open()) return;
    json_ << "{\"bench\": " << quoted(name_) << ", \"case\": " << quoted(peer.name)
          << ", \"shape\": {" << members
          << "}, \"precision\": " << (sizeof(T) == 4 ? "\"single\"" : "\"double\"")
          << ", \"threads\": " << threads << ", \"repeats\": " << times.elapsed.size();
    for (const auto& [key, value] : values) {
      json_ << ", " << quoted(key) << ": " << number("%.6g", value);
    }
    json_ << "}" << std::endl;
  }

  void describe_machine() {
    const dlnfast::BuildInfo build = dlnfast::build_info();
    const unsigned cores = std::thread::hardware_concurrency();
    std::printf("%s: %s, %u cores; %s; level %s%s; team of %d\n", name_.c_str(),
                processor().c_str(), cores, build.compiler.c_str(), build.level.c_str(),
                build.openmp ? "" : ", no OpenMP", team_);
    if (!json_.is_open()) return;
    json_ << "{\"bench\": " << quoted(name_) << ", \"processor\": " << quoted(processor())
          << ", \"cores\": " << cores << ", \"compiler\": " << quoted(build.compiler)
          << ", \"level\": " << quoted(build.level) << ", \"version\": " << quoted(build.version)
          << ", \"eigen\": " << quoted(build.eigen)
          << ", \"openmp\": " << (build.openmp ? "true" : "false") << ", \"threads\": " << team_
          << "}" << std::endl;
  }

  static std::string processor() {
    std::ifstream lines("/proc/cpuinfo");
    for (std::string line; std::getline(lines, line);) {
      const std::size_t colon = line.find(": ");
      if (line.rfind("model name", 0) == 0 && colon != line.npos) return line.substr(colon + 2);
    }
    return "unknown processor";
  }

  static double ratio(double rate, double peak) { return peak > 0.0 ? rate / peak : 0.0; }

  // Returns `missing` if x is not positive.
  static std::string number(const char* format, double x, const char* missing = "null") {
    char text[64];
    std::snprintf(text, sizeof text, format, x);
    return x > 0.0 ? text : missing;
  }

  static std::string duration(double seconds) {
    if (seconds < 1e-6) return number("%.1f ns", 1e9 * seconds);
    if (seconds < 1e-3) return number("%.2f us", 1e6 * seconds);
    if (seconds < 1.0) return number("%.2f ms", 1e3 * seconds);
    return number("%.2f s", seconds);
  }

  static std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') result += '\\';
      result += c;
    }
    return result + '"';
  }

  std::string name_, precision_;
  Index repeats_ = 0;
  int threads_ = 0;
  int team_ = 1;
  std::ofstream json_;
  Peaks peaks_{};
};

}  // namespace bench
