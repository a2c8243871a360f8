#!/usr/bin/env bash
# mutants.sh: one-line faults in the strategies, the schedules, the norm and communication, each of
# which the suite must catch; a line a fault says which test did, and how. Before a fault counts as
# caught, the unchanged program must have passed the same test, on as many ranks and with the same
# streams.
#   tests/mutants.sh          all of them
#   tests/mutants.sh waits    only the removed event waits, with queued streams: part of `make test`
# A mutant is a sed expression on one file; the file is compiled beside the real one and linked into
# the test that has to fail.
set -u
cd "$(dirname "$0")/.."
only=${1:-}
compile=$(make -s --no-print-directory BACKEND=cpu print-compile)
link=$(make -s --no-print-directory BACKEND=cpu print-link)
objects=$(make -s --no-print-directory BACKEND=cpu print-objects)
. tests/lib.sh
work=build/mutants
mkdir -p $work
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive THREEFOLD_TIMEOUT=20

# run PROGRAM RANKS STREAMS FILTER OUTPUT: STREAMS is immediate or queued:SEED
run() {
  if [ "$3" = immediate ]; then unset THREEFOLD_STREAMS; else export THREEFOLD_STREAMS=$3; fi
  timeout 120 $MPIEXEC -n "$2" "$1" $4 >"$5" 2>&1
}

# unchanged TEST RANKS STREAMS FILTER: whether the test passes as it is; each is run once
declare -A known
unchanged() {
  if [ -z "${known[$*]:-}" ]; then
    if run "build/cpu/tests/$1" "$2" "$3" "$4" "$work/unchanged.out"; then
      known[$*]=passes
    else
      known[$*]=fails
      local why
      why=$(grep -m1 '^FAIL' "$work/unchanged.out" || tail -1 "$work/unchanged.out")
      echo "FAIL $1${4:+ ($4)}  does not pass unchanged: $why"
    fi
  fi
  [ "${known[$*]}" = passes ]
}

# mutant GROUP NAME FILE SED RANKS STREAMS TEST [FILTER]
mutant() {
  local group=$1 name=$2 file=$3 change=$4 ranks=$5 streams=$6 test=$7 filter=${8:-}
  [ -z "$only" ] || [ "$only" = "$group" ] || return 0
  failed=$((failed + 1)) # until it is caught
  sed -E "$change" "$file" >"$work/$name.cpp" || {
    echo "FAIL $name  $file cannot be changed"
    return
  }
  if cmp -s "$file" "$work/$name.cpp"; then
    echo "FAIL $name  the change no longer applies to $file"
    return
  fi
  $compile -I"$(dirname "$file")" -Wno-error -O0 -g0 -c "$work/$name.cpp" -o "$work/$name.o" \
    2>"$work/$name.log" || {
    echo "FAIL $name  does not compile: $(head -1 "$work/$name.log")"
    return
  }
  local others
  others=$(echo $objects | tr ' ' '\n' | grep -v "obj/$file.o")
  $link "build/cpu/obj/tests/$test.cpp.o" $others "$work/$name.o" -o "$work/$name" -ldnnl -lxxhash \
    -fopenmp 2>"$work/$name.log" || {
    echo "FAIL $name  does not link: $(head -1 "$work/$name.log")"
    return
  }
  local all=immediate
  [ "$streams" = queued ] && all="queued:1 queued:2 queued:3"
  for streams in $all; do
    unchanged "$test" "$ranks" "$streams" "$filter" || return
    run "$work/$name" "$ranks" "$streams" "$filter" "$work/$name.out"
    local status=$?
    [ $status -eq 0 ] && continue
    if grep -q '^FAIL' "$work/$name.out"; then
      printf 'ok   %-19s %-58s %-20s -n %s%s  %s\n' "$file" "$name" "$test" "$ranks" \
        "$([ "$streams" = immediate ] || echo " $streams")" \
        "$(grep -m1 '^FAIL' "$work/$name.out" | cut -c6-140)"
      passed=$((passed + 1)) failed=$((failed - 1))
    else
      local end="ends with status $status"
      [ $status -eq 124 ] && end="does not end in 120 s"
      echo "FAIL $name  $end and no test says why: $(tail -1 "$work/$name.out" | cut -c1-110)"
    fi
    return
  done
  echo "FAIL $name  lives: $test passed with it"
}
parity=data_parallel_and_fsdp parity_tp=tensor_parallelism_equals
formulas=bytes_sent
parity_pp=every_schedule_equals parity_cp=context_parallelism_equals

mutant waits compute_does_not_wait_for_the_gather \
  fsdp.cpp '/ u.arrived.make_wait/d' 2 queued test_fsdp $parity
mutant waits a_shard_is_sent_before_the_optimizer_has_written_it \
  fsdp.cpp '/the shard that is sent/,/Timed/{/communicate_after_compute/d}' \
  2 queued test_fsdp $parity
mutant waits reduce_does_not_wait_for_the_gradients \
  fsdp.cpp '/the gradients must have been computed/d' 2 queued test_fsdp $parity
mutant waits a_shard_does_not_wait_for_its_sum \
  fsdp.cpp '/u.reduced.make_wait/d' 2 queued test_fsdp $parity
# The wait at the end of finish_backward is no mutant: sum_loss, which follows, waits for the same
# queue.
mutant waits a_layer_does_not_wait_for_the_partial_sums \
  tensor_parallel.cpp '/(x|the partial sums) must have been computed/d' \
  2 queued test_tensor_parallel $parity_tp
mutant waits a_layer_does_not_wait_for_the_sum \
  tensor_parallel.cpp '/compute_after_communication/d' 2 queued test_tensor_parallel $parity_tp
mutant waits a_stage_sends_before_it_has_computed \
  pipeline.cpp 's/^    if \(t.from == .*\) outbox_.at.*/    if (t.from == axis_.rank) {}/' \
  2 queued test_pipeline $parity_pp
mutant waits a_stage_computes_before_its_input_has_arrived \
  pipeline.cpp '/it must have arrived/d' 2 queued test_pipeline $parity_pp
mutant waits what_is_being_sent_is_overwritten \
  pipeline.cpp '/if \(lets_go\) parcel.event->make_wait/d' 2 queued test_pipeline $parity_pp

mutant waits a_stage_receives_into_memory_that_is_still_read \
  pipeline.cpp 's/else room_is_free_.make_wait.*/else {}/' 4 queued test_pipeline $parity_pp

mutant waits a_ring_sends_before_it_has_computed \
  context_parallel.cpp '/what is sent must be there/d' 3 queued test_context_parallel $parity_cp
mutant waits a_rank_attends_before_the_keys_have_come \
  context_parallel.cpp '/compute_after_communication/d' 3 queued test_context_parallel $parity_cp

# each_wait FILE RANKS TEST FILTER COMMENT...: without the wait that has this comment
each_wait() {
  local comment
  for comment in "${@:5}"; do
    mutant faults "no_wait_because_${comment// /_}" "$1" "/wait|communic/{/$comment/d}" \
      "$2" queued "$3" "$4"
  done
}
each_wait tensor_parallel.cpp 2 test_tensor_parallel $parity_tp "part must have been computed" \
  "x must have been computed" "partial sums must have been computed" "rows must have come" \
  "product below reads all_x" "the sum must have arrived" "next op reads the sum" \
  "first block reads the sum" \
  "maximum of all ranks" "both sums over all ranks" "gradients must have been computed"
each_wait tensor_parallel.cpp 2 test_generator the_cache_and_every "parts must have come"
each_wait context_parallel.cpp 3 test_context_parallel $parity_cp "kv must have left" \
  "what was sent must have left" "others must be here"
each_wait fsdp.cpp 4 test_fsdp $parity "shard must be complete"
mutant faults a_stage_keeps_eight_parcels \
  pipeline.cpp 's/exchanges_ - 4/exchanges_ - 8/' 2 immediate test_pipeline what_was_sent

# of_files NAME FILE SED FILTER
of_files() { mutant faults "$1" "$2" "$3" 1 immediate test_support "$4"; }
of_files two_dtypes_are_one checkpoint/safetensors.cpp \
  "s/dtype.find\(' '\) == dtype.npos && //" safetensors_are_refused
of_files another_writer_s_file_is_renamed support/files.cpp \
  's/file.is_at\(beside\) && examine/examine/' what_another
of_files a_cut_file_is_renamed support/files.cpp \
  's/ && examine\(file, beside\).st_size == sum.file.bytes//' what_another
of_files a_file_of_two_names_is_written support/files.cpp \
  's/examine\(file, beside\).st_nlink <= 1/true/' what_another
of_files a_manifest_may_name_any_file checkpoint/checkpoint.cpp \
  's/expect\(is_named/expect(true || is_named/' a_manifest_of
of_files a_text_may_change_while_it_is_encoded inference/text_shards.cpp \
  's/key\(\) == known/true/' a_text_that_changes
of_files another_s_tokens_are_encoded_again inference/text_shards.cpp 's/^      continue;  .*//' \
  a_text_that_changes

mutant faults the_reduce_scatter_is_dropped \
  fsdp.cpp '/NCCL_CHECK\(ncclReduceScatter/,/;$/d' 2 immediate test_fsdp $parity
mutant faults the_all_reduce_over_copies_is_dropped \
  fsdp.cpp '/NCCL_CHECK\(ncclAllReduce\(u.shard_grad.raw/,/;$/d' 2 immediate test_fsdp $parity
mutant faults the_shards_are_swapped \
  fsdp.cpp 's/(mine = u).shard_of\(u.whole_grad\)/\1.whole_grad.view(0, {u.shard_size})/' \
  2 immediate test_fsdp $parity
mutant faults the_loss_is_scaled_twice \
  trainer.cpp 's/1.0 \/ \(options.batch/2.0 \/ (options.batch/' \
  2 immediate test_fsdp $parity
mutant faults a_rank_repeats_the_sequences_of_another \
  trainer.cpp 's/turn \* axis.size \+ axis.rank/turn * axis.size/' \
  2 immediate test_fsdp $parity
mutant faults the_host_waits_inside_a_step \
  trainer.cpp 's/^  optimizer_->step\(lr\);/&\n  synchronize();/' \
  2 immediate test_trainer stands_still
mutant faults every_stage_reads_the_batch \
  trainer.cpp 's/ && \(embeds \|\| predicts\)//' 3 immediate test_trainer every_sequence
mutant faults the_tied_gradient_is_forgotten \
  trainer.cpp '/join_uses/d' 1 immediate test_fsdp $parity
mutant faults the_norm_is_not_summed_over_shards \
  trainer.cpp 's/\{mesh_.world\}, squares/{mesh_["tp"]}, squares/' 2 immediate test_fsdp $parity
mutant faults copies_count_twice_in_the_norm \
  trainer.cpp 's/fill\(squares, 0\);/;/' 2 immediate test_fsdp $parity
mutant faults the_weights_are_gathered_once_for_all_steps \
  fsdp.cpp \
  's/  for \(auto& \[number, u\] : units_\) reshard\(u\);.*//' \
  2 immediate test_fsdp $parity
mutant faults only_the_last_micro_batch_counts \
  fsdp.cpp 's/add\(u.shard_grad, u.shard_grad, mine/copy(u.shard_grad, mine/' \
  2 immediate test_fsdp $parity
mutant faults the_slope_of_gelu_forgets_its_bias \
  autograd.cpp 's/gelu_backward\(d, dy, x, value_of\(bias\)\)/gelu_backward(d, dy, x)/' \
  1 immediate test_autograd gradient_of_gelu
mutant faults a_bias_in_a_sum_has_no_gradient \
  autograd.cpp '/^    bias_gradient\(tape, bias, dy\);/d' 1 immediate test_autograd gradient_of_gelu
mutant faults the_first_writer_of_a_gradient_adds \
  autograd.cpp 's/adds = (use.begin_write\(\))/adds = (\1, true)/' \
  2 immediate test_fsdp $parity
mutant faults a_gradient_stays_fresh \
  autograd.cpp 's/dy, bias->begin_write\(\)/dy, !bias->fresh/' 2 immediate test_fsdp $parity
mutant faults a_head_s_gradient_is_not_fresh_again \
  autograd.cpp '/^  add\(p.grad, p.grad/,/fresh/{/fresh/d}' \
  2 immediate test_fsdp $parity
mutant faults embeddings_are_added_to_what_was_there \
  autograd.cpp '/clear_if_fresh/d' 2 immediate test_fsdp $parity
mutant faults the_first_micro_batch_is_added_to_the_last_step_s_sum \
  fsdp.cpp 's/if \(u.gradients_done == 1\) copy.*/if (false) {}/' \
  2 immediate test_fsdp $parity
mutant faults what_nobody_wrote_is_summed \
  fsdp.cpp '/clear_if_fresh/d' 4 queued test_pipeline $parity_pp
mutant faults padding_of_a_gradient_is_not_cleared \
  fsdp.cpp '/no writer clears the padding/d' 2 queued test_fsdp $parity
mutant faults a_unit_is_unsharded_once_too_often \
  fsdp.cpp 's/  if \(!backward_is_next\) reshard/  (void)backward_is_next; reshard/' \
  2 immediate test_fsdp $formulas
mutant faults nothing_is_resharded \
  fsdp.cpp 's/  u.whole = Tensor\(\);.*//' 2 immediate test_fsdp $formulas

mutant faults the_all_reduce_of_partial_products_is_dropped \
  tensor_parallel.cpp 's/^    all_reduce\(partial\);//' \
  2 immediate test_tensor_parallel $parity_tp
mutant faults every_rank_counts_the_squares_of_what_all_own \
  tensor_parallel.cpp 's/p.counted = axis_.rank == 0/p.counted = true/' \
  2 immediate test_tensor_parallel $parity_tp
mutant faults tp_ranks_have_other_owners_for_what_all_hold \
  fsdp.cpp 's/, p->largest_slice\)/, int64_t(0))/' \
  6 immediate test_tensor_parallel what_all_tp_ranks_hold
mutant faults gradients_stay_in_parts \
  tensor_parallel.cpp \
  's/^  if \(std::ranges::none_of.*partial\)\) return;$/  (void)params; return;/' \
  2 immediate test_tensor_parallel $parity_tp
mutant faults the_targets_logit_is_not_summed \
  tensor_parallel.cpp 's/parts.view\(R, \{2, R\}\)/parts.view(R, {R})/' \
  2 immediate test_tensor_parallel $parity_tp

mutant faults a_piece_begins_a_token_late \
  context_parallel.cpp \
  's/return \{piece\(rank\), /return {{piece(rank).begin + 1, piece(rank).end + 1}, /' \
  2 immediate test_context_parallel $parity_cp
mutant faults results_are_merged_without_their_weights \
  context_parallel.cpp \
  's/merge_attention\(sum, lse, part_out, part_lse\)/add(sum, sum, part_out)/' \
  2 immediate test_context_parallel $parity_cp
mutant faults the_last_round_is_lost \
  context_parallel.cpp 's/if \(round\) merge/if (round \&\& round + 1 < axis_.size) merge/' \
  3 immediate test_context_parallel $parity_cp
mutant faults gradients_of_keys_do_not_come_home \
  context_parallel.cpp '/  add\(own, own, others\);/d' 2 immediate test_context_parallel $parity_cp
mutant faults only_the_last_rank_adds_to_a_key_s_gradient \
  context_parallel.cpp '/add\(dkv, dkv, before\)/d' 3 immediate test_context_parallel $parity_cp
mutant faults the_loss_is_of_one_ranks_tokens \
  trainer.cpp 's/\{mesh_.world\}, total_/{mesh_["pp"]}, total_/' \
  2 immediate test_context_parallel $parity_cp
mutant faults what_tp_ranks_hold_alike_counts_twice_in_the_loss \
  trainer.cpp '/rank\) fill\(total_, 0\)/d' 2 immediate test_tensor_parallel $parity_tp
mutant faults a_whole_text_counts_on_every_rank \
  trainer.cpp '/scale \/= /d' 3 immediate test_context_parallel $parity_cp
mutant faults pieces_of_the_plain_cut \
  context_parallel.cpp \
  's/\{piece\(rank\), piece\(pieces - 1 - rank\)\}/{piece(2 * rank), piece(2 * rank + 1)}/' \
  2 immediate test_context_parallel same_work

mutant faults the_head_s_part_of_the_tied_gradient_stays_away \
  pipeline.cpp 's/^  add\(gradient, gradient, other\);.*//' 2 immediate test_pipeline $parity_pp
mutant faults both_ends_count_the_token_embedding_in_the_norm \
  trainer.cpp 's/gpt.tied\(\).counted = first;//' 2 immediate test_pipeline $parity_pp
mutant faults only_the_last_stage_knows_the_loss \
  trainer.cpp 's/\{mesh_.world\}, total_/{mesh_["fsdp"]}, total_/' \
  2 immediate test_pipeline $parity_pp
mutant faults weight_gradients_are_computed_twice \
  pipeline.cpp \
  's/(live.later.pop_front\(\)\)) (live.later.front\(\)\(\))/\1 \2, \2/' \
  2 immediate test_pipeline $parity_pp

# Off by one, and still a schedule: only its bubble or what is live tells.
live=live_micro_batches accepts=checker_accepts
mutant faults the_warm_up_is_one_forward_longer \
  schedule.cpp 's/\{p - 1 - s, "F"\},  /{p - s, "F"},  /' 1 immediate test_schedule $live
mutant faults the_warm_up_over_chunks_is_one_forward_longer \
  schedule.cpp 's/\{\(v - 1\)/{1 + (v - 1)/' 1 immediate test_schedule $live
mutant faults weight_gradients_are_put_off_by_one_more \
  schedule.cpp 's/\{s, "F B"\}/{s + 1, "F B"}/' 1 immediate test_schedule $live
mutant faults the_last_weight_gradients_are_left_out \
  schedule.cpp 's/\{s, "W1 W0"\}/{s, "W1"}/' 1 immediate test_schedule $accepts
mutant faults the_second_chunk_goes_down_again \
  schedule.cpp 's/s.stages - 1 - i : i/i : i/' 1 immediate test_schedule $accepts
mutant faults the_v_keeps_one_chunk_more \
  schedule.cpp 's/\{s, "F1 F0"\}/{s + 1, "F1 F0"}/' 1 immediate test_schedule $live
mutant faults the_v_puts_no_weight_gradients_off_at_the_end \
  schedule.cpp 's/"B0 B1"/"B0 B1 W1"/' 1 immediate test_schedule bubbles_equal
mutant faults transfers_are_placed_a_tick_late \
  schedule.cpp 's/exchanges\[int\(end\)\]/exchanges[int(end) + 1]/' \
  1 immediate test_schedule $accepts
mutant faults computations_come_before_the_transfers_of_their_tick \
  schedule.cpp 's/start >= tick \+ 1/start >= tick + 2/' \
  1 immediate test_schedule $accepts
mutant faults a_transfer_takes_no_moment \
  schedule.cpp 's/ \+ \(sent->to != stage\) \* kMoment//' 1 immediate test_schedule

# The engine that checks and simulates them, and its tasks.
earliest=the_earliest
mutant faults a_task_waits_for_nobody_in_the_other_queue \
  theory/timeline.cpp 's/t.after < 0 \? line.free : .*;/line.free;/' \
  1 immediate test_plan $earliest
mutant faults what_ranks_do_together_begins_with_the_first \
  theory/timeline.cpp 's/(start = std::)max(\(start, spans\[other\])/\1min\2/' \
  1 immediate test_plan $earliest
mutant faults a_send_does_not_wait_for_what_it_sends \
  theory/simulate.cpp 's/if \(t.from == stage\) needs.*/;/' 1 immediate test_plan $earliest
mutant faults gradients_may_be_summed_in_any_order \
  theory/simulate.cpp '/sums are made in ascending order/d' 1 immediate test_schedule

mesh=open_mesh ledger=ledger_enters
mutant faults ranks_of_other_lines_talk \
  comm.cpp 's/first = m.rank - axis.rank \* stride/first = axis.rank/' 4 immediate test_comm $mesh
mutant faults the_color_of_fsdp_forgets_tp \
  comm.cpp 's/m.rank - axis.rank \* stride/m.rank - axis.rank/' 4 immediate test_comm $mesh
mutant faults the_ranks_of_an_axis_are_swapped \
  comm.cpp 's/slower % n\}/n - 1 - slower % n}/' 2 immediate test_comm $mesh
mutant faults joined_axes_number_the_fast_axis_first \
  comm.cpp \
  's/axis.rank = axis.rank \* (m.axes\[a\]).size \+ m.*rank/axis.rank += axis.size * \1.rank/' \
  4 immediate test_comm joined
mutant faults the_first_minute_expects_another_sum \
  launch/first_minute.cpp 's/sum \+= 1 \+ rank/sum += 2 + rank/' 2 immediate test_comm $mesh
mutant faults the_report_compares_ranks_of_all_stages \
  launch/watch.cpp 's/entered\[r.stage\]/entered[0]/' 1 immediate test_support a_rank_is_behind
mutant faults the_ledger_enters_twice_the_bytes \
  comm.cpp 's/row.numerator \+= numerator/row.numerator += 2 * numerator/' \
  2 immediate test_comm $ledger
mutant faults the_ledger_forgets_to_count_calls \
  comm.cpp '/row.calls \+= calls;/d' 2 immediate test_comm $ledger
mutant faults ranks_agree_that_all_is_well_when_one_is \
  launch/job.cpp 's/if \(!text.empty\(\)\) return text/return text/' 2 immediate test_comm agree

mutant faults all_that_hold_a_parameter_count_it_in_the_norm \
  optimizer.cpp 's/ \&\& s.param->counted;/;/' 2 immediate test_tensor_parallel $parity_tp
mutant faults the_norm_is_that_of_this_rank \
  optimizer.cpp 's/if \(sum_\) sum_\(squares_\);//' 2 immediate test_fsdp $parity
mutant faults the_norm_is_that_of_the_last_parameter \
  optimizer.cpp 's/int\(s.param->id\)/0/' \
  1 immediate test_golden f64_equals_pytorch
lose='for (const ParamShard\& s : shards_)\n    if (!s.compute.empty()) cast(s.weights, s.compute);'
mutant faults masters_keep_the_bits_of_bf16_alone \
  optimizer.cpp "s/^  adamw\\(table_.*/&\\n  $lose/" 1 immediate test_golden bf16_equals
mutant faults a_bf16_run_has_the_norm_of_its_rank \
  trainer.cpp 's/\{mesh_.world\}, squares/{mesh_["tp"]}, squares/' 2 immediate test_fsdp bf16_curve
mutant faults vectors_decay_like_matrices \
  optimizer.cpp 's/s.param->decay,/true,/' 1 immediate test_golden f64_equals_pytorch
mutant faults a_parameter_counts_with_its_first_piece_alone \
  optimizer.cpp 's/counts \? int\(count\)/counts ? 1/' 1 immediate test_kernels sums_of_squares
mutant faults the_padding_of_a_part_of_the_vocabulary_is_in_the_softmax \
  tensor_parallel.cpp 's/V = part\(vocab\).size\(\)/V = (void(vocab), logits.value.dim(1))/' \
  2 immediate test_tensor_parallel padded_vocabularies
mutant faults padding_is_among_the_logits_that_are_sampled \
  tensor_parallel.cpp 's/^  Tensor all = logits;/  if (n == 1) return logits;\n&/' \
  1 immediate test_tensor_parallel held_out
mutant faults logits_that_are_sampled_are_rounded \
  tensor_parallel.cpp 's/dtype = master_dtype\(x.dtype\(\)\)/dtype = x.dtype()/' \
  1 immediate test_generator f32_and_bf16
mutant faults masters_begin_as_the_weights_that_compute \
  fsdp.cpp 's/born = .*/born = u.shard;/; s/cast\(u.shard, u.master\)/cast(u.master, u.shard)/' \
  1 immediate test_tensor_parallel initial_weights
mutant faults padding_is_saved_and_in_the_norm \
  fsdp.cpp 's/u.params\[i\]->numel\(\)\)/elements(u.params[i]->local_shape()))/' \
  2 immediate test_tensor_parallel padded_vocabularies
mutant faults rows_of_padding_are_not_cleared \
  tensor_parallel.cpp '/if \(padded > R\) fill/d' 2 queued test_tensor_parallel $parity_tp

mutant faults a_micro_batch_of_held_out_text_overlaps_the_next \
  trainer.cpp 's/std::min\(first_sequence\(i, count\)/std::min(first_sequence(i, 1)/' \
  2 immediate test_fsdp held_out
mutant faults moments_may_be_infinite \
  trainer.cpp 's/ && optimizer_->finite\(\)//' 2 immediate test_trainer moments
mutant faults the_learning_rate_stays \
  optimizer.cpp 's/return min_lr \+.*/(void)progress, (void)min_lr; return lr;/' \
  1 immediate test_golden the_learning_rate

# The result is the same, but nothing overlaps.
travels=what_travels_has_ops_beside_it
mutant faults no_unit_is_gathered_ahead \
  fsdp.cpp 's/k <= options_.prefetch/k < options_.prefetch/' 4 immediate test_trace $travels
mutant faults each_sum_of_gradients_is_awaited \
  fsdp.cpp 's/if \(options_.prefetch == 0\) may/may/' 4 immediate test_trace $travels
mutant faults the_weight_gradient_waits_for_the_input_gradient_s_sum \
  tensor_parallel.cpp 's/sum = start_sum\(partial\);.*/&\n    compute_after_communication();/' \
  4 immediate test_trace $travels
mutant faults attention_waits_for_the_next_keys \
  context_parallel.cpp \
  's/start_exchange\(\{\{kv, next\}\}\);/&\n      compute_after_communication();/' \
  4 immediate test_trace $travels
mutant faults a_stage_computes_nothing_while_it_sends \
  pipeline.cpp 's/^ +exchange\(a.transfers\);/&\n      compute_after_communication();/' \
  4 immediate test_trace $travels
# The same, and memory grows with the micro-batches.
mutant faults what_was_sent_is_kept_to_the_end_of_the_step \
  pipeline.cpp 's/^  release_sent\(exchanges_ - 4\);//' 2 immediate test_pipeline what_was_sent

mutant faults a_trace_counts_the_last_call_of_a_group_alone \
  support/recorder.cpp 's/\(\) \+= bytes/() = bytes/' 4 immediate test_trace
mutant faults a_trace_keeps_the_last_change_of_memory_alone \
  report/trace.cpp 's/(curve\}\]\[of\]) \+= bytes/\1 = bytes/' 4 immediate test_trace
mutant faults a_rebuilt_trace_forgets_what_works_wait_for \
  report/trace.cpp 's/w.after < 0 \? -1 : first \+ w.after/-1/' 4 immediate test_trace
mutant faults a_part_of_a_trace_hides_a_wait \
  report/trace.cpp 's/ \|\| \(w.after >= 0 && begin > computed\)//' 4 immediate test_trace
mutant faults a_trace_forgets_that_a_unit_is_freed \
  fsdp.cpp '/recorder.resharded/d' 4 immediate test_trace
mutant faults a_later_stage_gathers_when_it_needs_a_unit \
  fsdp.cpp 's/if \(!gathers_at_begin/if (gathers_at_begin/' 4 immediate test_trace
mutant faults sums_stand_before_the_last_exchange \
  trainer.cpp 's/sums_at_end = .*/sums_at_end = false;/' 4 immediate test_trace
mutant faults a_trace_forgets_what_a_micro_batch_frees \
  support/recorder.cpp 's/(to_string\(of\),) bytes/\1 std::abs(bytes)/' 4 immediate test_trace

sums_up
