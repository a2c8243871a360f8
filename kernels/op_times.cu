// op_times.cu: see op_times.h.
// idea      a step's ops take the events of the steps before again, and make only those that lack
#include "kernels/op_times.h"

OpTimes op_times;

void OpTimes::start(What what) {
  what_ = what;
  count_ = 0;
}

void OpTimes::begin(cudaStream_t stream, bool collective, Work work) {
  if (count_ == ops_.size()) ops_.emplace_back();
  open_ = &ops_[count_++];
  open_->work = std::move(work);
  open_->collective = collective;
  if (recorder.on) recorder.begin(queue_of(stream), open_->work.name);
  open_->begin.record(stream);
}

void OpTimes::end(cudaStream_t stream) {
  error_of([&] { open_->end.record(stream); });  // the next call says what is wrong
  if (recorder.on) recorder.end();
  open_ = nullptr;
}
