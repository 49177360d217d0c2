#include "bindings.hpp"
#include "resize.hpp"

void bind_resize(nb::module_& module) {
  using Image =
      nb::ndarray<const std::uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, nb::device::cpu>;
  using Out = nb::ndarray<float, nb::shape<-1, 3, -1, -1>, nb::c_contig, nb::device::cpu>;
  module.def(
      "resize_images",
      [](const std::vector<Image>& images, const std::vector<std::uint8_t>& mirrors, Out out,
         const std::string& filter, bool centre, const std::array<float, 3>& mean,
         const std::array<float, 3>& std, unsigned threads) {
        if (filter != "cubic" && filter != "linear") {
          throw std::invalid_argument("filter: expected cubic or linear, found '" + filter + "'");
        }
        if (images.size() != out.shape(0) || images.size() != mirrors.size() ||
            out.shape(2) != out.shape(3)) {
          throw std::invalid_argument(
              "resize_images: expected a mirror and a square for each image");
        }
        std::vector<laclip::Pixels> pixels;
        for (std::size_t i = 0; i < images.size(); ++i) {
          if (images[i].size() == 0) throw std::invalid_argument("resize_images: an empty image");
          pixels.push_back({images[i].data(), static_cast<std::uint32_t>(images[i].shape(1)),
                            static_cast<std::uint32_t>(images[i].shape(0)), mirrors[i] != 0});
        }
        const laclip::ResizeOptions options{
            static_cast<std::uint32_t>(out.shape(2)),
            filter == "cubic" ? laclip::Filter::kCubic : laclip::Filter::kLinear,
            centre,
            {mean[0], mean[1], mean[2]},
            {std[0], std[1], std[2]}};
        const nb::gil_scoped_release release;
        laclip::resize_images(pixels, options, {out.data(), out.size()}, threads);
      },
      "images"_a, "mirrors"_a, "out"_a, "filter"_a, "centre"_a, "mean"_a, "std"_a, "threads"_a,
      "Resizes RGB images as Pillow does, and normalizes them; see csrc/resize.hpp.");
}
