#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "aligned.h"
#include "float_environment.h"
#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kBlocksAtOnce = 32;  // handed out at a time

// One thread's working memory: 16 rows at a time.
class Encoder {
 public:
  explicit Encoder(const EncodeRequest& request)
      : request_(request),
        kernels_(*request.kernels),
        r_(request.items.columns),
        padded_(round_up(std::max<int64_t>(r_, 1), kLanes)),
        quads_(quads_of(r_)),
        rows_(kLanes * padded_),
        panel_(kLanes * padded_),
        scratch_(kLanes * padded_),
        codes_(3 * quads_ * kLanes) {}

  void block(int64_t block) {
    EncodedRows halves[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t first = block * kBlockRows + half * kLanes;
      rotate(first, kLanes);
      if (request_.fine) {
        EncodedRows fine = encode(fine_bits(request_.bits), 2);
        for (int i = 0; i < kLanes; ++i) write_fine(fine, i, first + i);
      }
      halves[half] = encode(request_.bits, half);
    }
    write_block(halves, request_.blocks + block * block_bytes(r_, request_.bits));
  }

  // Items [first, first + count) are rows[first], ...
  void rows(int64_t first, int64_t count, const int64_t* rows) {
    rotate(first, count);
    if (request_.fine) {
      const EncodedRows fine = encode(fine_bits(request_.bits), 2);
      for (int64_t i = 0; i < count; ++i) write_fine(fine, i, rows[first + i]);
    }
    const EncodedRows coarse = encode(request_.bits, 0);
    for (int64_t i = 0; i < count; ++i) write_row(coarse, i, rows[first + i]);
  }

 private:
  void rotate(int64_t first, int64_t count) {
    kernels_.stage(request_.items, first, count, padded_, rows_.data());
    kernels_.to_code_panel(rows_.data(), padded_, r_, panel_.data());
    kernels_.largest_of_panel(panel_.data(), r_, largest_);
    if (request_.row_scale.data) scale_panel(first, count);
    kernels_.rotate_panel(request_.rotation, panel_.data());
  }

  void scale_panel(int64_t first, int64_t count) {
    float scales[kLanes] = {}, before[kLanes];
    kernels_.widen(part_of(request_.row_scale, first, count), count, scales);
    std::copy(largest_, largest_ + kLanes, before);
    for (int64_t e = 0; e < r_; ++e)
      for (int i = 0; i < kLanes; ++i) panel_[e * kLanes + i] *= scales[i];
    kernels_.largest_of_panel(panel_.data(), r_, largest_);
    for (int i = 0; i < kLanes; ++i)
      if (scale_is_hazardous(before[i], largest_[i], scales[i])) panel_[i] = std::numeric_limits<float>::quiet_NaN();
  }

  EncodedRows encode(int bits, int place) {
    EncodedRows out;
    out.quads = reinterpret_cast<uint32_t (*)[kLanes]>(codes_.data() + place * quads_ * kLanes);
    std::copy(panel_.begin(), panel_.end(), scratch_.begin());
    kernels_.encode_panel(scratch_.data(), r_, largest_, bits, &out);
    return out;
  }

  void write_block(const EncodedRows* halves, char* block) const {
    uint32_t* codes = reinterpret_cast<uint32_t*>(block);
    for (int64_t q = 0; q < quads_; ++q) {
      const uint32_t *low = halves[0].quads[q], *high = halves[1].quads[q];
      if (request_.bits == 2) {  // bytes c + 3 are twice what is stored
        uint32_t* pair = codes + q / 2 * kLanes;
        for (int i = 0; i < kLanes; ++i)
          pair[i] = q % 2 ? pair[i] | (low[i] >> 1 | high[i] << 1) << 4 : low[i] >> 1 | high[i] << 1;
      } else if (request_.bits == 4)
        for (int i = 0; i < kLanes; ++i) *codes++ = low[i] | high[i] << 4;
      else
        for (int i = 0; i < kBlockRows; ++i) *codes++ = i < kLanes ? low[i] : high[i - kLanes];
    }
    char* side = block + block_code_bytes(r_, request_.bits);
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < kLanes; ++i) write_side(halves[half], i, side, half * kLanes + i);
  }

  static void write_side(const EncodedRows& rows, int64_t i, char* side, int64_t lane) {
    std::memcpy(side + lane * 4, &rows.scale[i], 4);
    std::memcpy(side + kBlockRows * 4 + lane * 2, &rows.lost[i], 2);
    std::memcpy(side + kBlockRows * 6 + lane * 2, &rows.norm[i], 2);
  }

  // Another row of the block may be read meanwhile: its part of a shared byte is written as it was.
  void write_row(const EncodedRows& rows, int64_t i, int64_t row) const {
    char* block = request_.blocks + row / kBlockRows * block_bytes(r_, request_.bits);
    const int64_t lane = row % kBlockRows;
    const int mask = (1 << request_.bits) - 1;
    for (int64_t e = 0; e < quads_ * kQuad; ++e) {
      const int code = rows.quads[e / kQuad][i] >> 8 * (e % kQuad) & 0xFF, shift = code_shift(lane, e, request_.bits);
      uint8_t& byte = reinterpret_cast<uint8_t*>(block)[code_place(lane, e, request_.bits)];
      byte = static_cast<uint8_t>((byte & ~(mask << shift)) | (request_.bits == 2 ? code / 2 : code) << shift);
    }
    write_side(rows, i, block + block_code_bytes(r_, request_.bits), lane);
  }

  void write_fine(const EncodedRows& rows, int64_t i, int64_t row) const {
    char* out = request_.fine + row * fine_row_bytes(r_, request_.bits);
    for (int64_t q = 0; q < quads_; ++q) {
      const uint16_t pair = packed_quad(rows.quads[q][i]);
      if (fine_bits(request_.bits) == 4) std::memcpy(out + q * sizeof pair, &pair, sizeof pair);
      else std::memcpy(out + q * kQuad, &rows.quads[q][i], kQuad);
    }
    out += fine_code_bytes(r_, request_.bits);
    std::memcpy(out, &rows.scale[i], 4);
    std::memcpy(out + 4, &rows.lost[i], 2);
    std::memcpy(out + 6, &rows.norm[i], 2);
  }

  const EncodeRequest& request_;
  const Kernels& kernels_;
  const int64_t r_, padded_, quads_;
  AlignedVector<float> rows_, panel_, scratch_;
  AlignedVector<uint32_t> codes_;
  float largest_[kLanes] = {};
};

}  // namespace

void encode_blocks(const EncodeRequest& request) {
  const int64_t blocks = request.items.rows / kBlockRows, tasks = (blocks + kBlocksAtOnce - 1) / kBlocksAtOnce;
  const int threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, std::max(request.threads, 1)));
  std::vector<Encoder> encoders(threads, Encoder(request));
  std::atomic<int64_t> next{0};
  run_parallel(threads, [&](int slot) {
    const DefaultFloatEnvironment environment;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      for (int64_t b = task * kBlocksAtOnce; b < std::min(blocks, (task + 1) * kBlocksAtOnce); ++b)
        encoders[slot].block(b);
  });
}

void encode_rows(const EncodeRequest& request, const int64_t* rows, int64_t blocks_count) {
  const DefaultFloatEnvironment environment;
  const int64_t count = std::lower_bound(rows, rows + request.items.rows, blocks_count * kBlockRows) - rows;
  Encoder encoder(request);
  for (int64_t first = 0; first < count; first += kLanes)
    encoder.rows(first, std::min<int64_t>(kLanes, count - first), rows);
}

}  // namespace urm
