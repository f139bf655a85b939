// SPDX-License-Identifier: MIT
#include "dlnfast/batch_descent.hpp"

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "dlnfast/recorders.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "dlnfast/threads.hpp"
#include "lane_descent.hpp"

namespace dlnfast {
namespace {

// Larger cores use whole vectors also one run at a time.
constexpr Index widest_in_lanes = 8;

template <class T>
void require_stack(const Stack<T>& stack, Index n, Index rows, Index cols,
                   const std::string& name) {
  if (stack.n == n && stack.rows == rows && stack.cols == cols) return;
  const auto shape = [](Index a, Index b, Index c) {
    return "(" + std::to_string(a) + ", " + std::to_string(b) + ", " + std::to_string(c) + ")";
  };
  throw ShapeError(name + " has shape " + shape(stack.n, stack.rows, stack.cols) + "; wanted " +
                   shape(n, rows, cols));
}

// The sizes that all parts of a batch share.
struct BatchSizes {
  Index runs = 0;
  Index layers = 0;
  Index widest = 0;  // largest width
  Index scalars = 0;
  Index records = 0;
};

template <class T>
BatchSizes check_sizes(const Batch<T>& batch, const Schedule& schedule,
                       const BatchRecords<T>& records) {
  if (batch.cores.empty()) throw ShapeError("cores is empty; wanted at least one layer");
  BatchSizes sizes;
  sizes.records = n_records(schedule);
  sizes.runs = batch.cores.front().n;
  sizes.layers = static_cast<Index>(batch.cores.size());
  const Index n = sizes.runs;
  Index width = batch.cores.front().cols;
  sizes.widest = width;
  for (std::size_t l = 0; l < batch.cores.size(); ++l) {
    const Stack<const T>& core = batch.cores[l];
    require_stack(core, n, core.rows, width, "cores[" + std::to_string(l) + "]");
    width = core.rows;
    sizes.widest = std::max(sizes.widest, width);
  }
  const Index d_in = batch.cores.front().cols;
  require_stack(batch.target, n, width, d_in, "target");
  if (!batch.input_gram.absent()) {
    const Index rank = std::min(batch.input_factor.cols, d_in);
    require_stack(batch.input_gram, n, d_in, d_in, "input_gram");
    require_stack(batch.input_factor, n, d_in, rank, "input_factor");
    require_stack(batch.factor_target, n, width, rank, "factor_target");
  }
  for (const FamilySpan& family : batch.families) {
    require_layers(family.first, family.length, sizes.layers);
    sizes.scalars += family.length;
  }
  const Index n_families = static_cast<Index>(batch.families.size());
  require_shape(batch.rho, n, sizes.scalars, "rho");
  require_shape(batch.multiplicity, n, n_families, "multiplicity");
  require_shape(batch.coupling, n, n_families, "coupling");
  for (Index f = 0; f < n_families; ++f) {
    if (batch.families[f].length == sizes.layers) continue;
    for (Index run = 0; run < n; ++run) {
      if (batch.coupling.row(run)[f] != 0.0) {
        throw ShapeError("coupling of a family that does not run through all layers is not zero");
      }
    }
  }
  require_shape(batch.learning_rate, n, sizes.layers, "learning_rate");
  require_shape(batch.weight_decay, n, sizes.layers, "weight_decay");
  require_shape(batch.momentum, n, sizes.layers, "momentum");
  require_shape(batch.loss_scale, n, 1, "loss_scale");
  require_shape(batch.loss_floor, n, 1, "loss_floor");

  require_shape(records.loss, n, schedule.steps + 1, "loss");
  require_shape(records.counts, n, 2, "counts");
  if (!records.core_records.empty()) {
    require_length(static_cast<Index>(records.core_records.size()), sizes.layers, "core_records");
    for (std::size_t l = 0; l < batch.cores.size(); ++l) {
      require_room(records.core_records[l], n,
                   {sizes.records, batch.cores[l].rows, batch.cores[l].cols},
                   "core_records[" + std::to_string(l) + "]");
    }
  }
  if (!records.rho_records.absent()) {
    require_stack(records.rho_records, n, sizes.records, sizes.scalars, "rho_records");
  }
  return sizes;
}

bool any_nonzero(const MatrixRef<const double>& m) {
  for (Index i = 0; i < m.rows; ++i) {
    for (Index j = 0; j < m.cols; ++j) {
      if (m.row(i)[j] != 0.0) return true;
    }
  }
  return false;
}

// Input and output of all workers.
template <class T>
struct Job {
  const Batch<T>& batch;
  const Schedule& schedule;
  const BatchRecords<T>& records;
  const BatchSizes& sizes;
  const LaneFeatures& features;
  std::vector<Result>& results;

  MatrixRef<T> core_record(Index layer, Index run, Index record) const {
    const auto& [data, shape] = records.core_records[layer];
    const Index i = run * sizes.records + record;
    return {data + i * shape[2] * shape[3], shape[2], shape[3]};
  }
  double* rho_record(Index run, Index record) const { return records.rho_records[run].row(record); }
};

// One thread of the team, which runs some of the tasks.
class Worker {
 public:
  virtual ~Worker() = default;
  virtual void run(Index task) = 0;
};

// The scalars of all families, as in reduced_descent.cpp, for one group of runs.
template <int lanes>
class LaneScalars {
  using P = simd::Pack<double>;
  using Vector = P::Vector;
  static_assert(lanes % P::size == 0, "lanes of floats are whole vectors of doubles");

 public:
  LaneScalars(const std::vector<FamilySpan>& spans, const MatrixRef<const double>& coupling,
              const LaneFeatures& features)
      : features_(features) {
    for (const FamilySpan& span : spans) {
      Family family;
      family.first = span.first;
      family.length = span.length;
      const Index f = static_cast<Index>(families_.size());
      family.is_coupled = any_nonzero(coupling.block(0, f, coupling.rows, 1));
      families_.push_back(family);
      for (Index i = 0; i < span.length; ++i) {
        scalars_.emplace_back();
        scalars_.back().layer = span.first + i;
      }
    }
  }

  template <class T>
  void load(int lane, const Batch<T>& batch, Index run) {
    clear(lane);
    const double scale = *batch.loss_scale.row(run);
    for (std::size_t f = 0; f < families_.size(); ++f) {
      const double strength = scale * batch.coupling.row(run)[f];
      families_[f].strength.a[lane] = strength;
      families_[f].energy.a[lane] = 0.5 * strength * batch.multiplicity.row(run)[f];
    }
    for (std::size_t i = 0; i < scalars_.size(); ++i) {
      Scalar& s = scalars_[i];
      s.rho.a[lane] = batch.rho.row(run)[i];
      s.rate.a[lane] = batch.learning_rate.row(run)[s.layer];
      s.decay.a[lane] = batch.weight_decay.row(run)[s.layer];
      s.momentum.a[lane] = batch.momentum.row(run)[s.layer];
    }
  }

  void clear(int lane) {
    for (Family& f : families_) f.strength.a[lane] = f.energy.a[lane] = 0.0;
    for (Scalar& s : scalars_) {
      for (Values* values :
           {&s.rho, &s.velocity, &s.compensation, &s.rate, &s.decay, &s.momentum}) {
        values->a[lane] = 0.0;
      }
    }
  }

  void store(int lane, double* out) const {
    for (const Scalar& s : scalars_) *out++ = s.rho.a[lane];
  }

  double largest(int lane, Index layer) const {
    double largest = 0.0;
    const Scalar* s = scalars_.data();
    for (const Family& family : families_) {
      if (family.first <= layer && layer < family.first + family.length) {
        const double r = std::abs(s[layer - family.first].rho.a[lane]);
        largest = std::isfinite(r) ? std::max(largest, r) : infinity;
      }
      s += family.length;
    }
    return largest;
  }

  // Adds the losses of the scalars, NaN if one is not finite, and prepares `update`. A gradient is
  // the product of the squares of the other scalars; this pass computes the product of those on the
  // left. No division.
  void add_loss(double* loss) {
    for (int i = 0; i < lanes; i += P::size) {
      Vector total = P::load(loss + i);
      Scalar* s = scalars_.data();
      for (const Family& family : families_) {
        Scalar* const end = s + family.length;
        Vector left = Vector{} + 1.0;
        for (; s < end; ++s) {
          const Vector rho = P::load(s->rho.a + i);
          total += 0.0 * rho;
          if (!family.is_coupled) continue;
          P::store(s->gradient.a + i, left * rho);
          left *= rho * rho;
        }
        const Vector energy = P::load(family.energy.a + i);
        total += energy != 0.0 ? energy * left : Vector{};
      }
      P::store(loss + i, total);
    }
  }

  void update() {
    for (int i = 0; i < lanes; i += P::size) {
      Scalar* begin = scalars_.data();
      for (const Family& family : families_) {
        const Vector strength = P::load(family.strength.a + i);
        Vector right = Vector{} + 1.0;
        for (Scalar* s = begin + family.length; s-- > begin;) {
          const Vector rho = P::load(s->rho.a + i);
          Vector gradient = {};
          if (family.is_coupled) {
            const Vector others = P::load(s->gradient.a + i) * right;
            gradient = strength != 0.0 ? others * strength : gradient;
            right *= rho * rho;
          }
          move(*s, rho, gradient, i);
        }
        begin += family.length;
      }
    }
  }

 private:
  struct alignas(64) Values {
    double a[lanes] = {};
  };
  struct Family {
    Index first = 0;
    Index length = 0;
    bool is_coupled = false;  // in any run
    Values strength;          // of the gradients: c s
    Values energy;            // c s m / 2
  };
  struct Scalar {
    Index layer = 0;
    Values rho, velocity, gradient, compensation, rate, decay, momentum;
  };

  void move(Scalar& s, const Vector& rho, const Vector& gradient, int i) const {
    Vector velocity = gradient;
    if (features_.decay) velocity += P::load(s.decay.a + i) * rho;
    if (features_.momentum) {
      velocity += P::load(s.momentum.a + i) * P::load(s.velocity.a + i);
      P::store(s.velocity.a + i, velocity);
    }
    const Vector corrected = -P::load(s.rate.a + i) * velocity - P::load(s.compensation.a + i);
    const Vector sum = rho + corrected;
    P::store(s.compensation.a + i, (sum - rho) - corrected);
    P::store(s.rho.a + i, sum);
  }

  LaneFeatures features_;
  std::vector<Family> families_;
  std::vector<Scalar> scalars_;
};

// Returns the smallest kernel for these widths, or null.
template <class T>
std::unique_ptr<LaneCores<T>> lane_cores(Index widest, Index n_layers,
                                         const LaneFeatures& features) {
  if (widest <= 2) return std::make_unique<LaneDescent<T, 2>>(n_layers, features);
  if (widest <= 4) return std::make_unique<LaneDescent<T, 4>>(n_layers, features);
  if (widest <= 6) return std::make_unique<LaneDescent<T, 6>>(n_layers, features);
  if (widest <= 8) return std::make_unique<LaneDescent<T, 8>>(n_layers, features);
  return nullptr;
}

template <class T>
class LaneWorker final : public Worker {
  static constexpr int lanes = LaneCores<T>::lanes;
  static constexpr Index block = 16;  // steps per write: losses are written run by run

 public:
  LaneWorker(const Job<T>& job, Monitor& monitor)
      : job_(job),
        poller_(monitor),
        cores_(lane_cores<T>(job.sizes.widest, job.sizes.layers, job.features)),
        scalars_(job.batch.families, job.batch.coupling, job.features) {}

  void run(Index task) override {
    load(task);
    try {
      descend();
    } catch (...) {
      for (int lane = 0; lane < lanes; ++lane) {
        if (active_[lane]) write_losses(lane, n_waiting_);
      }
      throw;
    }
  }

 private:
  void load(Index task) {
    first_ = task * lanes;
    written_ = n_waiting_ = 0;
    n_active_ = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      const Index run = first_ + lane;
      active_[lane] = run < job_.sizes.runs;
      if (active_[lane]) {
        cores_->load(lane, job_.batch, run);
        scalars_.load(lane, job_.batch, run);
        limit_[lane] = job_.schedule.tolerance;
        n_records_[lane] = 0;
        ++n_active_;
      } else {
        deactivate(lane);
      }
    }
  }

  void descend() {
    Index until_record = 0;
    for (Index step = 0;; ++step) {
      double* loss = waiting_[n_waiting_];
      cores_->evaluate(loss, poller_);
      scalars_.add_loss(loss);
      ++n_waiting_;
      const bool last = step == job_.schedule.steps;
      const bool at_record = last || until_record == 0;
      if (at_record) until_record = job_.schedule.record_every;
      if (at_record || !all_continue(loss)) {
        finish_or_record(step, at_record, last);
        if (n_active_ == 0) return;
      }
      if (n_waiting_ == block) {
        for (int lane = 0; lane < lanes; ++lane) {
          if (active_[lane]) write_losses(lane, n_waiting_);
        }
        written_ += n_waiting_;
        n_waiting_ = 0;
      }
      --until_record;
      cores_->update(poller_);
      scalars_.update();
    }
  }

  bool all_continue(const double* loss) const {
    bool all = true;
    for (int lane = 0; lane < lanes; ++lane) {
      all = all & (loss[lane] > limit_[lane]) & (loss[lane] < infinity);  // false for NaN
    }
    return all;
  }

  // Records the runs, and finishes those that end at this step.
  void finish_or_record(Index step, bool at_record, bool last) {
    for (int lane = 0; lane < lanes; ++lane) {
      if (!active_[lane]) continue;
      const double loss = waiting_[n_waiting_ - 1][lane];
      if (!std::isfinite(loss)) {
        finish(lane, n_waiting_ - 1, {Outcome::diverged, step, largest_layer(lane)});
        continue;
      }
      const bool converged = loss <= job_.schedule.tolerance;
      if (at_record || converged) record(lane);
      if (converged || last) {
        finish(lane, n_waiting_, {converged ? Outcome::converged : Outcome::finished, step, 0});
      }
    }
  }

  void record(int lane) {
    const Index run = first_ + lane;
    const Index record = n_records_[lane]++;
    if (!job_.records.core_records.empty()) {
      for (Index l = 0; l < job_.sizes.layers; ++l) {
        cores_->store_core(lane, l, job_.core_record(l, run, record));
      }
    }
    if (!job_.records.rho_records.absent()) scalars_.store(lane, job_.rho_record(run, record));
  }

  Index largest_layer(int lane) const {
    Index largest = 0;
    double largest_size = -1.0;
    for (Index l = 0; l < job_.sizes.layers; ++l) {
      const double size = std::max(cores_->largest_entry(lane, l), scalars_.largest(lane, l));
      if (size > largest_size) {
        largest_size = size;
        largest = l;
      }
    }
    return largest + 1;
  }

  void finish(int lane, Index n_valid, const Result& result) {
    write_losses(lane, n_valid);
    job_.results[first_ + lane] = result;
    active_[lane] = false;
    --n_active_;
    deactivate(lane);
  }

  // An inactive lane computes zeros, at no extra cost.
  void deactivate(int lane) {
    cores_->clear(lane);
    scalars_.clear(lane);
    limit_[lane] = -infinity;
  }

  // Writes the first `n` of the buffered losses.
  void write_losses(int lane, Index n) {
    double* out = job_.records.loss.row(first_ + lane) + written_;
    for (Index i = 0; i < n; ++i) out[i] = waiting_[i][lane];
    std::int64_t* counts = job_.records.counts.row(first_ + lane);
    counts[0] = written_ + n;
    counts[1] = n_records_[lane];
  }

  const Job<T>& job_;
  Poller poller_;
  std::unique_ptr<LaneCores<T>> cores_;
  LaneScalars<lanes> scalars_;
  Index first_ = 0;  // first run of the group
  Index n_active_ = 0;
  Index written_ = 0, n_waiting_ = 0;  // losses of the active runs
  Index n_records_[lanes] = {};
  bool active_[lanes] = {};
  double limit_[lanes] = {};
  alignas(64) double waiting_[block][lanes] = {};
};

// Runs whose cores are too large for lanes, one at a time.
template <class T>
class SingleWorker final : public Worker {
 public:
  SingleWorker(const Job<T>& job, Monitor& monitor)
      : job_(job), monitor_(monitor), record_steps_(job.sizes.records) {
    for (const auto& core : job.batch.cores) cores_.emplace_back(core.rows, core.cols);
  }

  void run(Index run) override {
    const Batch<T>& batch = job_.batch;
    std::vector<MatrixRef<T>> cores;
    for (std::size_t l = 0; l < cores_.size(); ++l) {
      cores_[l] = batch.cores[l][run].map();
      cores.emplace_back(cores_[l]);
    }
    Objective<T> objective;
    objective.target = batch.target[run];
    if (!batch.input_gram.absent()) {
      objective.input_gram = batch.input_gram[run];
      objective.input_factor = batch.input_factor[run];
      objective.factor_target = batch.factor_target[run];
    }
    objective.loss_scale = *batch.loss_scale.row(run);
    objective.loss_floor = *batch.loss_floor.row(run);
    const auto values = [run](const MatrixRef<const double>& m) {
      return std::vector<double>(m.row(run), m.row(run) + m.cols);
    };
    Rates rates;
    rates.learning_rate = values(batch.learning_rate);
    rates.weight_decay = values(batch.weight_decay);
    rates.momentum = values(batch.momentum);
    std::vector<Family> families;
    const double* rho = batch.rho.row(run);
    for (std::size_t f = 0; f < batch.families.size(); ++f) {
      const FamilySpan& span = batch.families[f];
      families.push_back({span.first, batch.multiplicity.row(run)[f], batch.coupling.row(run)[f],
                          std::vector<double>(rho, rho + span.length)});
      rho += span.length;
    }
    ReducedDescent<T> stepper(std::move(cores), objective, std::move(families), rates,
                              Context{1, &monitor_});
    RunRecorder recorder(job_, stepper, run);
    std::int64_t* counts = job_.records.counts.row(run);
    const Progress progress{job_.records.loss.row(run), record_steps_.data(), counts, counts + 1,
                            nullptr};
    job_.results[run] = descend(stepper, recorder, job_.schedule, progress, monitor_);
  }

 private:
  class RunRecorder final : public Recorder {
   public:
    RunRecorder(const Job<T>& job, const ReducedDescent<T>& stepper, Index run)
        : job_(job), stepper_(stepper), run_(run) {}
    void record(Index record, Index /*step*/) override {
      if (!job_.records.core_records.empty()) {
        for (Index l = 0; l < job_.sizes.layers; ++l) {
          stepper_.copy_core(l, job_.core_record(l, run_, record).data);
        }
      }
      if (!job_.records.rho_records.absent()) {
        std::copy(stepper_.rho().begin(), stepper_.rho().end(), job_.rho_record(run_, record));
      }
    }

   private:
    const Job<T>& job_;
    const ReducedDescent<T>& stepper_;
    Index run_;
  };

  const Job<T>& job_;
  Monitor& monitor_;
  std::vector<Matrix<T>> cores_;
  std::vector<std::int64_t> record_steps_;
};

// Counts the threads that have finished, so that the calling thread can wait for them.
class Latch {
 public:
  void arrive() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++n_arrived_;
    changed_.notify_one();
  }
  // Waits for up to 20 ms; returns whether `n` threads have finished.
  bool wait_for_arrivals(int n) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::milliseconds(20), [&] { return n_arrived_ >= n; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int n_arrived_ = 0;
};

// Runs tasks 0 .. n_tasks - 1 on a team. Only the calling thread polls the caller's monitor; the
// others check the `cancelled` flag.
template <class MakeWorker>
void run_tasks(Index n_tasks, int team, const Context& context, const MakeWorker& make_worker) {
  std::atomic<Index> next{0};
  std::atomic<bool> cancelled{false};
  Latch latch;
  parallel(team, [&](int member, int size) {
    // The is_caller thread is member 0.
    const bool is_caller = member == 0;
    Monitor monitor([&, is_caller](Index, double, bool) {
      if (is_caller) context.poll();
      return cancelled ? Answer::abort : Answer::go_on;
    });
    try {
      const std::unique_ptr<Worker> worker = make_worker(monitor);
      for (Index task = next++; task < n_tasks && !cancelled; task = next++) worker->run(task);
      while (is_caller && !latch.wait_for_arrivals(size - 1)) context.poll();
    } catch (...) {
      // The first exception is rethrown; those of the other threads follow from the cancellation.
      const bool first = !cancelled.exchange(true);
      if (!is_caller) latch.arrive();
      if (first) throw;
      return;
    }
    if (!is_caller) latch.arrive();
  });
}

// Flops per thread above which starting it pays off.
constexpr double flops_per_thread = 1e6;

}  // namespace

template <class T>
std::vector<Result> batch_descent(const Batch<T>& batch, const Schedule& schedule,
                                  const BatchRecords<T>& records, const Context& context) {
  const BatchSizes sizes = check_sizes(batch, schedule, records);
  std::vector<Result> results(sizes.runs, Result{Outcome::finished, 0, 0});
  for (Index run = 0; run < sizes.runs; ++run) {
    std::fill(records.counts.row(run), records.counts.row(run) + 2, 0);
  }
  const LaneFeatures features{batch.input_gram.absent(), any_nonzero(batch.weight_decay),
                              any_nonzero(batch.momentum)};
  const Job<T> job{batch, schedule, records, sizes, features, results};
  const bool in_lanes = sizes.widest <= widest_in_lanes;
  const Index per_task = in_lanes ? LaneCores<T>::lanes : 1;
  const Index n_tasks = (sizes.runs + per_task - 1) / per_task;
  const double size = static_cast<double>(sizes.widest);
  const double flops = 6.0 * static_cast<double>(sizes.layers) * size * size * size *
                       static_cast<double>(n_tasks * per_task) *
                       static_cast<double>(schedule.steps + 1);
  const Index team = std::min<Index>(team_size(context.n_threads, flops, flops_per_thread),
                                     std::max<Index>(1, n_tasks));
  run_tasks(n_tasks, static_cast<int>(team), context,
            [&](Monitor& monitor) -> std::unique_ptr<Worker> {
              if (in_lanes) return std::make_unique<LaneWorker<T>>(job, monitor);
              return std::make_unique<SingleWorker<T>>(job, monitor);
            });
  return results;
}

template std::vector<Result> batch_descent(const Batch<float>&, const Schedule&,
                                           const BatchRecords<float>&, const Context&);
template std::vector<Result> batch_descent(const Batch<double>&, const Schedule&,
                                           const BatchRecords<double>&, const Context&);

}  // namespace dlnfast
