// delay.cpp: a switch whose cables take time, for kernels that lack netem. nodes.sh starts it.
//   build/delay PORTS MICROSECONDS MBIT
//
// idea      Each port is a TUN device: what a node sends can be read from its port, and what is
//           written to it arrives there. A packet goes to the port that the last byte of its
//           address names (254: 0). First it passes that port's wire, which carries one packet
//           at a time at MBIT (0: at once); it arrives MICROSECONDS later.
// cost      it adds 20 to 30 microseconds of its own
// not here  loss, jitter, anything but IPv4
// test      tests/test_network.sh
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <deque>
#include <string>
#include <system_error>
#include <vector>

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds, std::chrono::nanoseconds;

struct Packet {
  Clock::time_point due;
  std::string bytes;
};
struct Port {
  int file;
  Clock::time_point wire_free{};
  std::deque<Packet> underway{};  // to this port, in the order of their arrival
};

// Large TCP segments pass whole, as between virtual machines: a header (virtio's; its own file is
// no C++) says how to cut them.
constexpr size_t kHeader = 10, kAddress = kHeader + 19;

static int open_port(size_t number) {
  ifreq request{};
  request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  ("port" + std::to_string(number)).copy(request.ifr_name, IFNAMSIZ - 1);
  const int file = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  if (file < 0 || ioctl(file, TUNSETIFF, &request) ||
      ioctl(file, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
    throw std::system_error(errno, std::generic_category(), "a TUN device cannot be made");
  return file;
}

// Hands over what is due. A full device takes the packet later; one that is down loses it.
static void deliver(Port& port) {
  while (!port.underway.empty() && port.underway.front().due <= Clock::now()) {
    const std::string& bytes = port.underway.front().bytes;
    if (write(port.file, bytes.data(), bytes.size()) < 0 && errno == EAGAIN) return;
    port.underway.pop_front();
  }
}

// Reads a packet, if there is one, and puts it on the wire to its port.
static bool forward(Port& from, std::vector<Port>& ports, microseconds delay, double mbit) {
  char buffer[kHeader + 65600];
  const ssize_t read_bytes = read(from.file, buffer, sizeof buffer);
  if (read_bytes < 0) return false;
  const size_t bytes = size_t(read_bytes), number = uint8_t(buffer[kAddress]) % 254;
  const bool is_ipv4 = bytes > kAddress && buffer[kHeader] >> 4 == 4;
  if (!is_ipv4 || number >= ports.size()) return true;
  Port& to = ports[number];
  to.wire_free = std::max(to.wire_free, Clock::now());
  if (mbit > 0) to.wire_free += nanoseconds(int64_t(double(bytes - kHeader) * 8000 / mbit));
  to.underway.push_back({to.wire_free + delay, {buffer, bytes}});
  return true;
}

int main(int argc, char** argv) {
  if (argc != 4) return fputs("usage: build/delay PORTS MICROSECONDS MBIT\n", stderr), 1;
  try {
    std::vector<Port> ports;
    std::vector<pollfd> polled;
    for (size_t p = 0; p < std::stoul(argv[1]); p++) {
      ports.push_back({open_port(p)});
      polled.push_back({ports[p].file, POLLIN, 0});
    }
    const microseconds delay(std::stol(argv[2]));
    const double mbit = std::stod(argv[3]);
    while (true) {
      auto next = Clock::now() + std::chrono::milliseconds(999);
      for (Port& port : ports) {
        deliver(port);
        if (!port.underway.empty()) next = std::min(next, port.underway.front().due);
      }
      // a timer is late by up to 100 us: what is due sooner is waited for by asking
      const auto wait = next - Clock::now();
      const timespec time{0, wait > microseconds(100) ? wait.count() : 0};
      ppoll(polled.data(), polled.size(), &time, nullptr);
      for (size_t p = 0; p < ports.size(); p++)
        for (int i = 0; polled[p].revents & POLLIN && i < 16; i++)
          if (!forward(ports[p], ports, delay, mbit)) break;
    }
  } catch (const std::exception& e) {
    return fprintf(stderr, "build/delay: %s\n", e.what()), 1;
  }
}
