#!/usr/bin/env bash
# portable.sh: `make check-portable`: other systems than the one that this is written on. As root,
# on Debian with debootstrap; each system is made once, in PLACE (build/portable), and kept.
#   tests/portable.sh trixie   Debian 13 with nothing but a compiler, make, git and python3:
#                              make run, then make test
#   tests/portable.sh arm64    built by Debian's cross compiler, run by qemu: 3 steps of tiny on two
#                              ranks have this machine's f64 losses within 1e-12; FAITHFUL kernels
#   tests/portable.sh clang    this system's clang (with libomp beside oneDNN's libgomp): make test
# Without arguments all three. It takes an hour or two; ONLY=run leaves out make test.
set -u
cd "$(dirname "$0")/.."
. tests/lib.sh
place=$(realpath -m "${PLACE:-build/portable}")
logs=$place/logs
mkdir -p "$logs"
[ "$(id -u)" = 0 ] || {
  echo "tests/portable.sh makes systems of its own, for which it has to be root"
  exit 1
}

# system NAME SUITE PACKAGES...: makes it, if it is not there, and copies this project into it
system() {
  local root=$place/$1 suite=$2
  shift 2
  if [ ! -e "$root/ready" ]; then
    command -v debootstrap >/dev/null || apt-get install -y -qq debootstrap
    [ -e "$root/etc/debian_version" ] || debootstrap --variant=minbase "$suite" "$root" || return
    [ "$suite" != bookworm ] || chroot "$root" dpkg --add-architecture arm64
    inside "$root" "cd / && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get \
      install -y -qq --no-install-recommends $*" && touch "$root/ready" || return
  fi
  copy_to "$root/threefold"
}
# copy_to DIRECTORY: the project, beside what was built there
copy_to() {
  mkdir -p "$1"
  find "$1" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
  git ls-files -z | tar --null -T - -cf - | tar -xf - -C "$1"
}
# inside ROOT COMMAND: in the project's copy there; what is mounted for it is gone afterwards
inside() {
  unshare --mount bash -c '
    for of in proc sys dev; do mount --rbind /$of "$0/$of" || exit; done
    cp /etc/resolv.conf "$0/etc/" &&
      exec chroot "$0" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/bin:/bin:/usr/sbin:/sbin \
        bash -c "mkdir -p /threefold && cd /threefold && $1"' "$1" "$2"
}
# step NAME LOG COMMAND...: passes when the command does; shows the closing line of its log
step() {
  local name=$1 log=$logs/$2 began=$SECONDS status
  shift 2
  "$@" >"$log" 2>&1
  status=$?
  check "$name" "[ $status = 0 ]" \
    "$(grep -E '^[0-9]+ passed' "$log" | tail -1) in $((SECONDS - began)) s" \
    "status $status; $(grep -c '^FAIL' "$log") FAIL; $(tail -1 "$log") ($log)"
  grep '^FAIL' "$log"
  [ $status = 0 ]
}

on_trixie() {
  system trixie trixie g++ make git python3 ca-certificates || return
  step trixie_make_run trixie-run inside "$place/trixie" "rm -rf build && make run"
  [ "${ONLY:-}" = run ] || step trixie_make_test trixie-test inside "$place/trixie" "make test"
}

on_arm64() {
  # what Debian's development packages of two architectures bring along cannot be installed side by
  # side, so these are unpacked only
  system arm64 bookworm g++-aarch64-linux-gnu make git python3 mpich qemu-user libmpich12:arm64 \
    libdnnl2:arm64 nlohmann-json3-dev libxxhash0:arm64 libgomp1:arm64 || return
  [ -e "$place/arm64/usr/lib/aarch64-linux-gnu/libdnnl.so" ] || inside "$place/arm64" "cd /tmp &&
    apt-get download libmpich-dev:arm64 libdnnl-dev:arm64 libxxhash-dev:arm64 &&
    for p in *_arm64.deb; do dpkg -x \$p /; done" || return
  local cross="MPICH_CXX=aarch64-linux-gnu-g++ make MARCH=armv8-a -j$cores"
  local options="--model tiny --dtype f64 --steps 3 --batch 2 --data README.md"
  local run="OMP_NUM_THREADS=1 mpiexec -n 2 qemu-aarch64 build/cpu/train_gpt"
  step arm64_builds arm64-build inside "$place/arm64" "$cross BACKEND=cpu build/cpu/train_gpt" \
    || return
  make -s BACKEND=cpu build/cpu/train_gpt || return
  local layout name
  for layout in "--fsdp 2" "--tp 2"; do
    name=${layout//[- ]/}
    OMP_NUM_THREADS=1 $MPIEXEC -n 2 build/cpu/train_gpt $options $layout \
      --metrics "$dir/$name" >"$logs/x86-$name" 2>&1
    step "arm64_trains_$name" "arm64-$name" \
      inside "$place/arm64" "$run $options $layout --metrics $name.jsonl --timeout 900"
    local worst
    worst=$(worst 3 "$dir/$name" "$place/arm64/threefold/$name.jsonl")
    check "arm64_has_the_losses_of_x86_$name" "at_most $worst 1e-12" "within $worst" "$worst"
  done
  local tests="test_kernels test_tensor"
  step arm64_faithful_builds arm64-faithful-build inside "$place/arm64" \
    "$cross BACKEND=faithful $(printf 'build/faithful/tests/%s ' $tests)"
  for name in $tests; do
    step "arm64_faithful_$name" "arm64-$name" inside "$place/arm64" \
      "qemu-aarch64 build/faithful/tests/$name"
  done
}

on_clang() {
  command -v clang++ >/dev/null && ls /usr/lib/llvm-*/lib/libomp.so >/dev/null 2>&1 \
    || apt-get install -y -qq --no-install-recommends clang libomp-dev || return
  local copy=$place/clang
  copy_to "$copy"
  local -x MPICH_CXX=clang++
  step clang_builds clang-build make -C "$copy" BACKEND=cpu -j"$cores" build || return
  OMP_NUM_THREADS=2 "$copy/build/cpu/train_gpt" --steps 1 --layers 1 >"$logs/clang-train" 2>&1
  check clang_takes_the_threads_that_are_there "grep -q '^device.*2 threads' $logs/clang-train" \
    "$(grep '^device' "$logs/clang-train")" "$(tail -1 "$logs/clang-train")"
  [ "${ONLY:-}" = run ] || step clang_make_test clang-test make -C "$copy" test
}

[ $# -gt 0 ] || set -- trixie arm64 clang
for name in "$@"; do
  case $name in
    trixie | arm64 | clang) "on_$name" || fail "$name" "could not be made" ;;
    *) fail "$name" "is no system that this knows: trixie, arm64 or clang" ;;
  esac
done
sums_up
