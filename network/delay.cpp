// delay.cpp: a switch whose cables take time, for kernels that lack netem. nodes.sh starts it.
//   build/delay PORTS MICROSECONDS MBIT
//
// idea      Each port is a TUN device: what a node sends can be read from its port, and what is
//           written to it arrives there. A packet goes to the port that the last byte of its
//           address names (254: 0). First it passes that port's wire, which carries one packet
//           at a time at MBIT (0: immediately); it arrives MICROSECONDS later.
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
#include <map>

#include "support/check.h"

using namespace std::chrono;

struct Packet {
  int port;  // its file
  std::string bytes;
};

// Large TCP segments pass whole, as between virtual machines: before each packet stand the 10 bytes
// of virtio_net_hdr, which say how to cut it (<linux/virtio_net.h> does not compile as C++).
constexpr int kHeader = 10, kAddress = kHeader + 19;

static int open_port(size_t number) {
  ifreq request{};
  request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  ("port" + std::to_string(number)).copy(request.ifr_name, IFNAMSIZ - 1);
  const int file = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  SYSTEM_CHECK(file >= 0 && !ioctl(file, TUNSETIFF, &request) &&
                   !ioctl(file, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4),
               "a TUN device cannot be made");
  return file;
}

int main(int argc, char** argv) {
  if (argc != 4) return fputs("usage: build/delay PORTS MICROSECONDS MBIT\n", stderr), 1;
  return run_main("build/delay", [&] {
    std::vector<pollfd> ports;
    while (ports.size() < std::stoul(argv[1]))
      ports.push_back({open_port(ports.size()), POLLIN, 0});
    const microseconds delay(std::stol(argv[2]));
    const double mbit = std::stod(argv[3]);
    std::vector<steady_clock::time_point> wire_free(ports.size());
    std::multimap<steady_clock::time_point, Packet> underway;  // by when they arrive
    char buffer[kHeader + 65600];
    while (true) {
      // what is due is handed over; a device that is full or down loses it
      auto next = steady_clock::now() + 999ms;
      for (; !underway.empty(); underway.erase(underway.begin())) {
        const auto& [due, packet] = *underway.begin();
        next = std::min(next, due);
        if (due > steady_clock::now()) break;
        (void)!write(packet.port, packet.bytes.data(), packet.bytes.size());
      }
      // a timer is late by up to 100 us: what is due sooner is waited for by asking
      const auto wait = next - steady_clock::now();
      const timespec time{0, wait > 100us ? wait.count() : 0};
      ppoll(ports.data(), ports.size(), &time, nullptr);
      // packets go from their ports on the wire to others
      for (const pollfd& from : ports)
        for (int i = 0; from.revents & POLLIN && i < 16; i++) {
          const ssize_t bytes = read(from.fd, buffer, sizeof buffer);
          if (bytes < 0) break;
          if (bytes <= kAddress || buffer[kHeader] >> 4 != 4) continue;  // no IPv4
          const size_t to = uint8_t(buffer[kAddress]) % 254;
          if (to >= ports.size()) continue;
          auto& wire = wire_free[to];
          wire = std::max(wire, steady_clock::now());
          if (mbit > 0) wire += nanoseconds(int64_t((bytes - kHeader) * 8000 / mbit));
          underway.emplace(wire + delay, Packet{ports[to].fd, {buffer, buffer + bytes}});
        }
    }
  });
}
