"""The built-in prompt sets: four manners of rewriting, 16 pairs each, written for laclip.

A set is a text: its first line asks for the rewrites, then every line is a caption as the web has
it, and the indented line below it one answer.
"""

PLAIN = """
Say each image caption in other plain words, keeping its meaning.
Old red barn near Route 9, Vermont
    a weathered red barn standing close to a country road in Vermont
two kids building a sandcastle at the beach
    a pair of children shaping a castle out of sand by the sea
Vintage wooden rocking chair w/ cushion
    an old rocking chair made of wood with a soft cushion on its seat
bride and groom cutting the cake
    newlyweds slicing into their wedding cake together
Golden retriever puppy asleep on couch
    a young golden dog napping on a sofa
fresh strawberries in a blue bowl
    a blue dish filled with ripe strawberries
the harbour at night with fishing boats
    fishing boats moored in a port after dark
Men's waterproof hiking boots, brown leather
    brown leather boots for hiking that keep the water out
a cyclist climbing a steep mountain pass
    a person on a bicycle riding up a steep road in the mountains
Modern kitchen with white cabinets and island
    a contemporary kitchen that has white cupboards and a counter in the middle
crowd cheering at an outdoor concert
    people shouting with joy at a concert in the open air
snow covered pine trees in the morning light
    pines under a layer of snow as the day begins
cat looking out of a rainy window
    a cat watching the rain through the glass
hand holding a cup of black coffee
    someone's hand around a mug of coffee without milk
Antique map of the island, 1780
    a historic map from 1780 that shows the island
a farmer selling vegetables at the market
    a market stall where a farmer offers vegetables
"""

DETAILED = """
Describe each image caption's scene in one fuller sentence with visible details.
sunset over lake
    a calm lake reflects an orange and pink sky while the sun sinks behind dark hills
Man playing guitar on street corner
    a man in a worn jacket plays an acoustic guitar on a street corner as people walk past
homemade pizza
    a round homemade pizza with melted cheese, tomato sauce and basil lies on a wooden board
Black evening dress with lace sleeves
    a long black evening dress with sheer lace sleeves hangs against a plain light background
kids at a birthday party
    smiling children in paper hats gather around a table with a candlelit birthday cake
lighthouse in storm
    tall grey waves break against the rocks below a white lighthouse under heavy clouds
Office desk with laptop and plant
    an open laptop, a notebook and a small green plant stand on a tidy wooden office desk
red vintage car at show
    a shiny red vintage car with chrome bumpers is parked on the grass among other classic cars
hummingbird feeding
    a tiny green hummingbird hovers with blurred wings and dips its beak into a bright flower
Old stone bridge over river
    an old stone bridge with two mossy arches spans a slow river lined with willow trees
woman reading in park
    a woman sits on a park bench in the shade of a tree, absorbed in a paperback book
basketball player dunking
    a basketball player leaps high above the rim and slams the ball through the hoop with one hand
bedroom interior, grey and white
    a bright bedroom has a wide bed with white linen, grey pillows and a soft rug on the floor
street market in Asia
    rows of colourful stalls with fruit and lanterns fill a narrow street crowded with shoppers
elephant and calf
    a small elephant calf walks close to its mother's legs across dry yellow grass
bowl of ramen
    a deep bowl of steaming ramen holds noodles, sliced pork, half an egg and chopped green onions
"""

BRIEF = """
Shorten each image caption to the few words that say what is seen.
A beautiful panoramic view of the snow-capped mountains as seen from our hotel balcony last winter
    snowy mountains seen from a balcony
Stock photo: young businesswoman in a suit talking on her mobile phone while walking to work
    a businesswoman walking and phoning
My grandmother's famous apple pie, fresh out of the oven and ready for the whole family
    a freshly baked apple pie
Brand new condition mountain bike with 21 speeds, disc brakes and a black aluminium frame
    a black mountain bike
The little boy could not stop laughing while the puppy licked his face in our back garden
    a puppy licking a laughing boy
Aerial drone photograph of a container ship leaving the port early on a foggy morning
    a container ship in fog from above
Amazing street art that we discovered painted on the side of an abandoned factory building
    graffiti on an old factory wall
Set of four hand-painted ceramic coffee mugs with floral pattern, dishwasher safe, gift box
    four flowered ceramic mugs
Portrait of an elderly fisherman with a white beard who has worked at sea for sixty years
    a white-bearded old fisherman
The players of the home team celebrate after scoring the winning goal in the final minute
    football players celebrating a goal
Close up macro shot of morning dew drops hanging on a spider's web between two branches
    dew on a spider's web
Traditional dancers in colourful costumes performing at the annual harvest festival downtown
    dancers in bright costumes
This cosy living room features a fireplace, two leather armchairs and a large bookshelf
    a living room with a fireplace
An adorable baby panda climbing up a tree trunk at the wildlife conservation centre
    a baby panda on a tree
Commuters waiting on the platform as the high speed train arrives at the central station
    a train arriving at a platform
Delicious healthy salad with avocado, cherry tomatoes, feta cheese and an olive oil dressing
    avocado and tomato salad
"""

LIVELY = """
Retell each image caption as a lively sentence, as if telling a friend about the picture.
dog catching frisbee
    look at this dog flying through the air to snatch a frisbee with its teeth
empty subway station at midnight
    not a soul in sight, only humming lights along a deserted subway platform at midnight
Handmade knitted scarf, green wool
    somebody knitted this thick green woollen scarf by hand, stitch after patient stitch
surfer riding a large wave
    a daring surfer races down the face of a towering wave just before it crashes
grandfather and grandson fishing
    side by side on the bank, a grandfather and his grandson wait for the fish to bite
city skyline with fireworks
    fireworks burst in every colour above the glittering towers of the city
Chocolate cake with raspberries
    dark, rich chocolate cake topped with juicy raspberries that beg to be eaten
horses running in field
    a herd of horses thunders across an open field with manes streaming in the wind
Rainy street with umbrellas
    umbrellas bob along a wet street where every puddle mirrors the lights
firefighter rescues kitten
    a firefighter carefully carries a frightened kitten down to safety
abandoned house in forest
    deep in the woods a forgotten house slowly disappears beneath ivy and moss
ballet dancer on stage
    all alone in the spotlight, a ballerina spins gracefully on the tips of her toes
Hot air balloons at sunrise
    dozens of striped hot air balloons drift silently into the glowing morning sky
toddler with finger paint
    a delighted toddler smears bright paint over the paper and most of her face too
desert road, Arizona
    one long ribbon of road runs dead straight through the baking Arizona desert
Owl perched on a branch
    a watchful owl stares straight at you from its branch without a single blink
"""
